"""The four kinds of generated problems that the embedded model solves, as benchmarks."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from coterie.errors import TaskError
from coterie.lab.evals.task import Grade, Item, TaskOptions
from coterie.lab.problems import PROBLEM_MAKERS, Problem, draw_problem
from coterie.lab.sandbox import require_backend, run_program

ANSWER_PATTERNS = {  # the last match in an output is its answer
    "words": re.compile(r"####\s*(-?\d+)"),
    "algebra": re.compile(r"\\boxed\{\s*(-?\d+)\s*\}"),
}


@dataclass(frozen=True)
class EmbeddedTask:
    """``count`` held-out problems of one kind, generated from ``seed``.

    A larger ``count`` extends the items of a smaller one. An id is "words/<seed>/<n>".
    """

    name: str
    count: int
    seed: int
    trust: bool = False

    def settings(self) -> Mapping[str, object]:
        pattern = ANSWER_PATTERNS.get(self.name)
        return {
            "split": "test",
            "seed": self.seed,
            "count": self.count,
            "shots": 0,
            "template": "{question}",
            "counts": "asserts pass" if pattern is None else pattern.pattern,
        }

    def generation(self) -> Mapping[str, object]:
        """Empty: the model is trained with the engine's defaults."""
        return {}

    def items(self) -> Sequence[Item]:
        return [
            Item(f"{self.name}/{self.seed}/{number}", problem.prompt, problem.gold)
            for number, problem in enumerate(_draw_problems(self.name, self.seed, self.count))
        ]

    def prompt(self, item: Item) -> str:
        return item.question

    def grade(self, output: str, item: Item) -> Grade:
        return grade(self.name, output, item.gold, trust=self.trust)


def open_embedded(name: str, options: TaskOptions) -> EmbeddedTask:
    """The task ``name``; raises TaskError for options that it does not have."""
    if options.count < 1:
        raise TaskError(f"{name}: {options.count} items; at least 1")
    options.require_zero_shot(name)
    if name not in ANSWER_PATTERNS:
        require_backend(options.trust)
    return EmbeddedTask(name, options.count, options.seed, options.trust)


def grade(name: str, output: str, gold: str, *, trust: bool = False) -> Grade:
    """Grades an output of the kind ``name``; ``gold`` is a number, or asserts that follow the code.

    Raises TaskError for code if no sandbox works and ``trust`` is false.
    """
    if name in ANSWER_PATTERNS:
        matches = ANSWER_PATTERNS[name].findall(output)
        expected = gold_number(name, gold)
        return Grade(bool(matches) and matches[-1] == expected, matches[-1] if matches else None)
    return Grade(run_program(output, gold, trust=trust).passed, output)


def gold_number(name: str, gold: str) -> str:
    """The number of a gold answer: the bare number, or a text that ends like the task's answers.

    Raises TaskError if there is none.
    """
    matches = ANSWER_PATTERNS[name].findall(gold)
    number = matches[-1] if matches else gold.strip()
    if not re.fullmatch(r"-?\d+", number):
        raise TaskError(f"{gold!r} is no integer and does not end in one")
    return number


@cache
def _draw_problems(name: str, seed: int, count: int) -> tuple[Problem, ...]:
    rng = random.Random(f"{name}/{seed}")
    return tuple(draw_problem(PROBLEM_MAKERS[name], rng, "test") for _ in range(count))
