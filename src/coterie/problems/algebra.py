r"""Algebra in the manner of MATH: worked steps, then ``\boxed{n}``."""

from __future__ import annotations

import random
from collections.abc import Callable

from coterie.problems.facts import LARGEST, product
from coterie.problems.problem import Problem, Worked

LETTERS = ["x", "y", "n", "t"]


Kind = Callable[[random.Random, str], Worked]


def linear_plus(rng: random.Random, v: str) -> Worked:
    a, x, p = product(rng, LARGEST - 1)
    b = rng.randint(1, LARGEST - p)
    return Worked(
        (a, b, p + b),
        f"Solve {a}{v} + {b} = {p + b} for {v}.",
        f"Subtract {b} from both sides: {a}{v} = {p + b} - {b} = {p}. "
        f"Divide both sides by {a}: {v} = {p} / {a} = {x}.",
        x,
    )


def linear_minus(rng: random.Random, v: str) -> Worked:
    a, x, p = product(rng)
    b = rng.randint(1, p - 1)
    return Worked(
        (a, b, p - b),
        f"Solve {a}{v} - {b} = {p - b} for {v}.",
        f"Add {b} to both sides: {a}{v} = {p - b} + {b} = {p}. "
        f"Divide both sides by {a}: {v} = {p} / {a} = {x}.",
        x,
    )


def value_plus(rng: random.Random, v: str) -> Worked:
    a, x, p = product(rng, LARGEST - 1)
    b = rng.randint(1, LARGEST - p)
    return Worked(
        (a, x, b),
        f"What is the value of {a}{v} + {b} when {v} = {x}?",
        f"Put {v} = {x} into the expression: {a} * {x} + {b}. "
        f"First {a} * {x} = {p}. Then {p} + {b} = {p + b}.",
        p + b,
    )


def value_minus(rng: random.Random, v: str) -> Worked:
    a, x, p = product(rng)
    b = rng.randint(1, p - 1)
    return Worked(
        (a, x, b),
        f"What is the value of {a}{v} - {b} when {v} = {x}?",
        f"Put {v} = {x} into the expression: {a} * {x} - {b}. "
        f"First {a} * {x} = {p}. Then {p} - {b} = {p - b}.",
        p - b,
    )


def quotient(rng: random.Random, v: str) -> Worked:
    a, q, p = product(rng)
    b = rng.randint(1, LARGEST - q)
    return Worked(
        (a, b, q + b),
        f"Solve {v} / {a} + {b} = {q + b} for {v}.",
        f"Subtract {b} from both sides: {v} / {a} = {q + b} - {b} = {q}. "
        f"Multiply both sides by {a}: {v} = {q} * {a} = {p}.",
        p,
    )


def next_term(rng: random.Random, v: str) -> Worked:
    first = rng.randint(0, LARGEST // 2)
    step = rng.randint(1, (LARGEST - first) // 3)
    second, third = first + step, first + 2 * step
    return Worked(
        (first, step),
        f"The sequence {first}, {second}, {third} goes on with equal steps. "
        f"What is its next term {v}?",
        f"Each step adds {second} - {first} = {step}. "
        f"The next term is {v} = {third} + {step} = {third + step}.",
        third + step,
    )


def bracket(rng: random.Random, v: str) -> Worked:
    a, s, p = product(rng)
    x = rng.randint(1, s - 1) if s > 2 else 1
    b = s - x
    return Worked(
        (a, b, p),
        f"Solve {a}({v} + {b}) = {p} for {v}.",
        f"Divide both sides by {a}: {v} + {b} = {p} / {a} = {s}. "
        f"Subtract {b} from both sides: {v} = {s} - {b} = {x}.",
        x,
    )


KINDS: dict[str, Kind] = {
    "linear-plus": linear_plus,
    "linear-minus": linear_minus,
    "value-plus": value_plus,
    "value-minus": value_minus,
    "quotient": quotient,
    "next-term": next_term,
    "bracket": bracket,
}


def algebra_problem(rng: random.Random) -> Problem:
    """One exercise of a random kind."""
    kind = rng.choice(list(KINDS))
    worked = KINDS[kind](rng, rng.choice(LETTERS))
    return worked.problem("algebra", kind, r"The answer is \boxed{{}}.")
