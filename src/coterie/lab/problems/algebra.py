r"""Algebra problems like those of MATH: worked steps, then ``\boxed{n}``."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from coterie.lab.problems.facts import MAX_NUMBER, draw_product, draw_product_and_term
from coterie.lab.problems.problem import Problem, WorkedProblem

LETTERS = ["x", "y", "n", "t"]

AlgebraMaker = Callable[[random.Random, str], WorkedProblem]


def linear(rng: random.Random, v: str, *, sign: str) -> WorkedProblem:
    a, x, p, b, total = draw_product_and_term(rng, sign)
    first, inverse = (f"Subtract {b} from", "-") if sign == "+" else (f"Add {b} to", "+")
    return WorkedProblem(
        (a, b, total),
        f"Solve {a}{v} {sign} {b} = {total} for {v}.",
        f"{first} both sides: {a}{v} = {total} {inverse} {b} = {p}. "
        f"Divide both sides by {a}: {v} = {p} / {a} = {x}.",
        x,
    )


def value(rng: random.Random, v: str, *, sign: str) -> WorkedProblem:
    a, x, p, b, total = draw_product_and_term(rng, sign)
    return WorkedProblem(
        (a, x, b),
        f"What is the value of {a}{v} {sign} {b} when {v} = {x}?",
        f"Put {v} = {x} into the expression: {a} * {x} {sign} {b}. "
        f"First {a} * {x} = {p}. Then {p} {sign} {b} = {total}.",
        total,
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
    "linear-plus": partial(linear, sign="+"),
    "linear-minus": partial(linear, sign="-"),
    "value-plus": partial(value, sign="+"),
    "value-minus": partial(value, sign="-"),
    "quotient": quotient,
    "next-term": next_term,
    "bracket": bracket,
}


def algebra_problem(rng: random.Random) -> Problem:
    """One problem of a random kind."""
    kind = rng.choice(list(KINDS))
    problem = KINDS[kind](rng, rng.choice(LETTERS))
    return problem.to_problem("algebra", kind, r"The answer is \boxed{{}}.")
