"""A small problem with a checkable answer, and its split into training and test problems."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
ProblemKey = tuple[str | int, ...]

TEST_MODULUS = 8  # one key in eight is a test problem


@dataclass(frozen=True)
class Problem:
    """One question and its worked answer.

    ``gold`` is the graded result: the final number as text, or for code the assertions that must
    pass. ``key`` is the kind of problem and its numbers. It alone determines the split, so a test
    problem differs from training problems in more than its names.
    """

    task: str
    key: ProblemKey
    prompt: str
    answer: str
    gold: str


@dataclass(frozen=True)
class WorkedProblem:
    """A question with its numbers, its worked steps and its result."""

    numbers: tuple[int, ...]
    question: str
    steps: str
    result: int

    def to_problem(self, task: str, kind: str, ending: str) -> Problem:
        """``ending`` is the last line of the answer, with {} for the result: "#### {}"."""
        return Problem(
            task=task,
            key=(kind, *self.numbers),
            prompt=self.question,
            answer=f"{self.steps}\n{ending.replace('{}', str(self.result))}",
            gold=str(self.result),
        )


ProblemMaker = Callable[[random.Random], Problem]
"""Draws one problem of a task, of either split."""


def split_of(key: ProblemKey) -> Split:
    """The split of a key, by a hash that is equal on all machines."""
    return "test" if zlib.crc32(repr(key).encode()) % TEST_MODULUS == 0 else "train"


def draw_problem(maker: ProblemMaker, rng: random.Random, split: Split) -> Problem:
    """A problem of this split: redraws until its key lies in it."""
    while True:
        problem = maker(rng)
        if split_of(problem.key) == split:
            return problem
