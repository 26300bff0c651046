"""Arithmetic of the embedded model's problems, with numbers from 0 to 50."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

MAX_NUMBER = 50

EQUATION = re.compile(r"\d+ ([-+*/]) \d+ = \d+")
PRODUCTS = [(a, b) for a in range(2, 10) for b in range(2, 10) if a * b <= MAX_NUMBER]


def draw_product(rng: random.Random, maximum: int = MAX_NUMBER) -> tuple[int, int, int]:
    """Two factors from 2 to 9 and their product, at most ``maximum``."""
    a, b = rng.choice([pair for pair in PRODUCTS if pair[0] * pair[1] <= maximum])
    return a, b, a * b


def draw_product_and_term(rng: random.Random, sign: str) -> tuple[int, int, int, int, int]:
    """Two factors, their product, a number to add or subtract, and the result, at least 1."""
    a, b, product = draw_product(rng, MAX_NUMBER - (sign == "+"))
    term = rng.randint(1, MAX_NUMBER - product if sign == "+" else product - 1)
    return a, b, product, term, product + term if sign == "+" else product - term


def draw_equation(rng: random.Random, sign: str | None = None) -> str:
    """An equation such as ``12 - 5 = 7``; most are sums and differences."""
    kind = sign or rng.choices("+-*/", weights=(5, 5, 1, 1))[0]
    if kind in "*/":
        a, b, c = draw_product(rng)
        return f"{a} * {b} = {c}" if kind == "*" else f"{c} / {a} = {b}"
    part, total = sorted((rng.randint(0, MAX_NUMBER), rng.randint(0, MAX_NUMBER)))
    if kind == "+":
        return f"{part} + {total - part} = {total}"
    return f"{total} - {part} = {total - part}"


def replace_equations(steps: str, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """Worked steps with each equation replaced by a random one with the same operator.

    Yields parts: a text, and whether it is the result of an equation.
    """
    end = 0
    for match in EQUATION.finditer(steps):
        expression, result = draw_equation(rng, match[1]).split(" = ")
        yield f"{steps[end : match.start()]}{expression} =", False
        yield f" {result}", True
        end = match.end()
    yield steps[end:], False
