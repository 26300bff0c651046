"""A benchmark for tests: prompts are token ids, and what is right is a hash's whim."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.lab.evals.task import Grade, Item


@dataclass(frozen=True)
class Quiz:
    """``odd`` questions stand among the others at their own numbers."""

    name: str = "quiz"
    count: int = 6
    tokens: int = 12
    odd: Mapping[int, str] | None = None
    note: str = ""
    pause: float = 0.0  # seconds that grading takes

    def settings(self) -> Mapping[str, object]:
        return {"note": self.note}

    def generation(self) -> Mapping[str, object]:
        return {"max_new_tokens": self.tokens}

    def items(self) -> Sequence[Item]:
        usual = {n: f"{n % 90} {n * 7 % 90} 3 {n + 1}" for n in range(self.count)}
        asked = {**usual, **(self.odd or {})}
        return [Item(f"{self.name}/{n}", text, str(n)) for n, text in asked.items()]

    def prompt(self, item: Item) -> str:
        return item.question

    def grade(self, output: str, item: Item) -> Grade:
        time.sleep(self.pause)
        whim = zlib.crc32(f"{item.id} {output}".encode())
        return Grade(whim % 3 > 0, output[:4], {"even": whim % 2 == 0})


@dataclass(frozen=True)
class Prompts:
    """A task of given prompts, for experiments that grade nothing."""

    name: str
    prompts: Sequence[str]

    def settings(self) -> Mapping[str, object]:
        return {}

    def generation(self) -> Mapping[str, object]:
        return {}

    def items(self) -> Sequence[Item]:
        return [Item(f"{self.name}/{n}", prompt, "") for n, prompt in enumerate(self.prompts)]

    def prompt(self, item: Item) -> str:
        return item.question

    def grade(self, output: str, item: Item) -> Grade:
        return Grade(correct=False, extracted=None)
