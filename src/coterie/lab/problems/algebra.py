r"""Algebra problems like those of MATH: worked steps, then ``\boxed{n}``."""

from __future__ import annotations

import random
from collections.abc import Callable

from coterie.lab.problems.facts import MAX_NUMBER, draw_product
from coterie.lab.problems.problem import Problem, WorkedProblem

LETTERS = ["x", "y", "n", "t"]

AlgebraMaker = Callable[[random.Random, str], WorkedProblem]


def linear_plus(rng: random.Random, v: str) -> WorkedProblem:
    a, x, p = draw_product(rng, MAX_NUMBER - 1)
    b = rng.randint(1, MAX_NUMBER - p)
    return WorkedProblem(
        (a, b, p + b),
        f"Solve {a}{v} + {b} = {p + b} for {v}.",
        f"Subtract {b} from both sides: {a}{v} = {p + b} - {b} = {p}. "
        f"Divide both sides by {a}: {v} = {p} / {a} = {x}.",
        x,
    )


def linear_minus(rng: random.Random, v: str) -> WorkedProblem:
    a, x, p = draw_product(rng)
    b = rng.randint(1, p - 1)
    return WorkedProblem(
        (a, b, p - b),
        f"Solve {a}{v} - {b} = {p - b} for {v}.",
        f"Add {b} to both sides: {a}{v} = {p - b} + {b} = {p}. "
        f"Divide both sides by {a}: {v} = {p} / {a} = {x}.",
        x,
    )


def value_plus(rng: random.Random, v: str) -> WorkedProblem:
    a, x, p = draw_product(rng, MAX_NUMBER - 1)
    b = rng.randint(1, MAX_NUMBER - p)
    return WorkedProblem(
        (a, x, b),
        f"What is the value of {a}{v} + {b} when {v} = {x}?",
        f"Put {v} = {x} into the expression: {a} * {x} + {b}. "
        f"First {a} * {x} = {p}. Then {p} + {b} = {p + b}.",
        p + b,
    )


def value_minus(rng: random.Random, v: str) -> WorkedProblem:
    a, x, p = draw_product(rng)
    b = rng.randint(1, p - 1)
    return WorkedProblem(
        (a, x, b),
        f"What is the value of {a}{v} - {b} when {v} = {x}?",
        f"Put {v} = {x} into the expression: {a} * {x} - {b}. "
        f"First {a} * {x} = {p}. Then {p} - {b} = {p - b}.",
        p - b,
    )


def quotient(rng: random.Random, v: str) -> WorkedProblem:
    a, q, p = draw_product(rng)
    b = rng.randint(1, MAX_NUMBER - q)
    return WorkedProblem(
        (a, b, q + b),
        f"Solve {v} / {a} + {b} = {q + b} for {v}.",
        f"Subtract {b} from both sides: {v} / {a} = {q + b} - {b} = {q}. "
        f"Multiply both sides by {a}: {v} = {q} * {a} = {p}.",
        p,
    )


def next_term(rng: random.Random, v: str) -> WorkedProblem:
    first = rng.randint(0, MAX_NUMBER // 2)
    step = rng.randint(1, (MAX_NUMBER - first) // 3)
    second, third = first + step, first + 2 * step
    return WorkedProblem(
        (first, step),
        f"The sequence {first}, {second}, {third} goes on with equal steps. "
        f"What is its next term {v}?",
        f"Each step adds {second} - {first} = {step}. "
        f"The next term is {v} = {third} + {step} = {third + step}.",
        third + step,
    )


def bracket(rng: random.Random, v: str) -> WorkedProblem:
    a, s, p = draw_product(rng)
    x = rng.randint(1, s - 1) if s > 2 else 1
    b = s - x
    return WorkedProblem(
        (a, b, p),
        f"Solve {a}({v} + {b}) = {p} for {v}.",
        f"Divide both sides by {a}: {v} + {b} = {p} / {a} = {s}. "
        f"Subtract {b} from both sides: {v} = {s} - {b} = {x}.",
        x,
    )


KINDS: dict[str, AlgebraMaker] = {
    "linear-plus": linear_plus,
    "linear-minus": linear_minus,
    "value-plus": value_plus,
    "value-minus": value_minus,
    "quotient": quotient,
    "next-term": next_term,
    "bracket": bracket,
}


def algebra_problem(rng: random.Random) -> Problem:
    """One problem of a random kind."""
    kind = rng.choice(list(KINDS))
    problem = KINDS[kind](rng, rng.choice(LETTERS))
    return problem.to_problem("algebra", kind, r"The answer is \boxed{{}}.")
