"""A benchmark for tests: prompts are token ids, and what is right is a hash's whim."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence

from coterie.lab.evals.task import QUESTION, Grade, Item, Task


def make_quiz(
    name: str = "quiz",
    count: int = 6,
    tokens: int = 12,
    *,
    odd: Mapping[int, str] | None = None,
    note: str = "",
    pause: float = 0.0,  # seconds that grading takes
) -> Task:
    """``odd`` questions stand among the others at their own numbers."""
    usual = {n: f"{n % 90} {n * 7 % 90} 3 {n + 1}" for n in range(count)}
    asked = {**usual, **(odd or {})}
    items = tuple(Item(f"{name}/{n}", text, str(n)) for n, text in asked.items())

    def grade(output: str, item: Item) -> Grade:
        time.sleep(pause)
        whim = zlib.crc32(f"{item.id} {output}".encode())
        return Grade(whim % 3 > 0, output[:4], {"even": whim % 2 == 0})

    return Task(name, items, QUESTION, grade, {"note": note}, tokens)


def make_prompts(name: str, prompts: Sequence[str]) -> Task:
    """A task of given prompts, for experiments that grade nothing."""
    items = tuple(Item(f"{name}/{n}", prompt, "") for n, prompt in enumerate(prompts))
    return Task(name, items, QUESTION, lambda output, item: Grade(False, None), {})
