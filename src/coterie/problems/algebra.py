r"""Algebra in the manner of MATH: worked steps, then ``\boxed{n}``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from coterie.problems.facts import LARGEST, product
from coterie.problems.problem import Problem

LETTERS = ["x", "y", "n", "t"]


@dataclass(frozen=True)
class Exercise:
    """The numbers an exercise is made of, its question, the steps and the result."""

    numbers: tuple[int, ...]
    question: str
    steps: str
    result: int


Kind = Callable[[random.Random, str], Exercise]


def linear_plus(rng: random.Random, v: str) -> Exercise:
    a, x, p = product(rng, LARGEST - 1)
    b = rng.randint(1, LARGEST - p)
    return Exercise(
        (a, b, p + b),
        f"Solve {a}{v} + {b} = {p + b} for {v}.",
        f"Subtract {b} from both sides: {a}{v} = {p + b} - {b} = {p}. "
        f"Divide both sides by {a}: {v} = {p} / {a} = {x}.",
        x,
    )


def linear_minus(rng: random.Random, v: str) -> Exercise:
    a, x, p = product(rng)
    b = rng.randint(1, p - 1)
    return Exercise(
        (a, b, p - b),
        f"Solve {a}{v} - {b} = {p - b} for {v}.",
        f"Add {b} to both sides: {a}{v} = {p - b} + {b} = {p}. "
        f"Divide both sides by {a}: {v} = {p} / {a} = {x}.",
        x,
    )


def value_plus(rng: random.Random, v: str) -> Exercise:
    a, x, p = product(rng, LARGEST - 1)
    b = rng.randint(1, LARGEST - p)
    return Exercise(
        (a, x, b),
        f"What is the value of {a}{v} + {b} when {v} = {x}?",
        f"Put {v} = {x} into the expression: {a} * {x} + {b}. "
        f"First {a} * {x} = {p}. Then {p} + {b} = {p + b}.",
        p + b,
    )


def value_minus(rng: random.Random, v: str) -> Exercise:
    a, x, p = product(rng)
    b = rng.randint(1, p - 1)
    return Exercise(
        (a, x, b),
        f"What is the value of {a}{v} - {b} when {v} = {x}?",
        f"Put {v} = {x} into the expression: {a} * {x} - {b}. "
        f"First {a} * {x} = {p}. Then {p} - {b} = {p - b}.",
        p - b,
    )


def quotient(rng: random.Random, v: str) -> Exercise:
    a, q, p = product(rng)
    b = rng.randint(1, LARGEST - q)
    return Exercise(
        (a, b, q + b),
        f"Solve {v} / {a} + {b} = {q + b} for {v}.",
        f"Subtract {b} from both sides: {v} / {a} = {q + b} - {b} = {q}. "
        f"Multiply both sides by {a}: {v} = {q} * {a} = {p}.",
        p,
    )


def next_term(rng: random.Random, v: str) -> Exercise:
    first = rng.randint(0, LARGEST // 2)
    step = rng.randint(1, (LARGEST - first) // 3)
    second, third = first + step, first + 2 * step
    return Exercise(
        (first, step),
        f"The sequence {first}, {second}, {third} goes on with equal steps. "
        f"What is its next term {v}?",
        f"Each step adds {second} - {first} = {step}. "
        f"The next term is {v} = {third} + {step} = {third + step}.",
        third + step,
    )


def bracket(rng: random.Random, v: str) -> Exercise:
    a, s, p = product(rng)
    x = rng.randint(1, s - 1) if s > 2 else 1
    b = s - x
    return Exercise(
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
    exercise = KINDS[kind](rng, rng.choice(LETTERS))
    return Problem(
        task="algebra",
        key=(kind, *exercise.numbers),
        prompt=exercise.question,
        answer=f"{exercise.steps}\nThe answer is \\boxed{{{exercise.result}}}.",
        gold=str(exercise.result),
    )
