"""A small problem with a checkable answer, and the split that keeps training and test apart."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "test"]
ProblemKey = tuple[str | int, ...]

TEST_MODULUS = 8  # one combination in eight is never trained on


@dataclass(frozen=True)
class Problem:
    """One question and its worked answer.

    ``gold`` is what the grader compares: the final number as text, or for code the assertions
    that the function must pass. ``key`` names the combination of kind and numbers, which alone
    decides the split, so that a test problem is new in more than its names.
    """

    task: str
    key: ProblemKey
    prompt: str
    answer: str
    gold: str


@dataclass(frozen=True)
class WorkedProblem:
    """A question with its steps: the numbers that it is made of, and the number it comes to."""

    numbers: tuple[int, ...]
    question: str
    steps: str
    result: int

    def to_problem(self, task: str, kind: str, ending: str) -> Problem:
        """``ending`` ("#### {}") tells the result after the steps."""
        return Problem(
            task=task,
            key=(kind, *self.numbers),
            prompt=self.question,
            answer=f"{self.steps}\n{ending.replace('{}', str(self.result))}",
            gold=str(self.result),
        )


class ProblemMaker(Protocol):
    """Draws one problem of a kind, of either split."""

    def __call__(self, rng: random.Random) -> Problem: ...


def split_of(key: ProblemKey) -> Split:
    """The side on which a combination lies: a fixed hash of the key, the same everywhere."""
    return "test" if zlib.crc32(repr(key).encode()) % TEST_MODULUS == 0 else "train"


def draw_problem(maker: ProblemMaker, rng: random.Random, split: Split) -> Problem:
    """A problem of ``split``: redraws until the combination lies on that side."""
    while True:
        problem = maker(rng)
        if split_of(problem.key) == split:
            return problem
