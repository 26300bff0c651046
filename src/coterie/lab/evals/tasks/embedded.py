r"""The four kinds of small problems that the model in the package solves, as benchmarks."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from coterie.errors import CoterieError
from coterie.lab.evals.task import Grade, Item, Task, TaskOptions
from coterie.lab.problems import PROBLEM_MAKERS as MAKERS
from coterie.lab.problems import Problem, draw_problem
from coterie.lab.sandbox import require_backend, run_program

ANSWER_PATTERNS = {  # the last of these in the output is its answer
    "words": re.compile(r"####\s*(-?\d+)"),
    "algebra": re.compile(r"\\boxed\{\s*(-?\d+)\s*\}"),
}


@dataclass(frozen=True)
class EmbeddedTask:
    """``count`` held-out problems of one kind, drawn from ``seed``; code runs in the sandbox.

    A longer draw begins with the shorter one's items. ``id`` is "words/<seed>/<n>".
    """

    name: str
    count: int
    seed: int
    trust: bool = False

    def settings(self) -> Mapping[str, object]:
        return {
            "split": "test",
            "seed": self.seed,
            "count": self.count,
            "shots": 0,
            "template": "{question}",
            "counts": ANSWER_PATTERNS[self.name].pattern
            if self.name in ANSWER_PATTERNS
            else "asserts pass",
        }

    def generation(self) -> Mapping[str, object]:
        """The model's own defaults: it was trained with them."""
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


def task_opener(name: str) -> Callable[[TaskOptions], Task]:
    """What opens the kind ``name``."""
    return partial(_open, name)


def grade(name: str, output: str, gold: str, *, trust: bool = False) -> Grade:
    """Of an output of the kind ``name``; ``gold`` is a number, or asserts that follow the code.

    Raises CoterieError for code, where nothing can keep it in and it is not trusted.
    """
    if name in ANSWER_PATTERNS:
        matches = ANSWER_PATTERNS[name].findall(output)
        expected = gold_number(name, gold)
        return Grade(bool(matches) and matches[-1] == expected, matches[-1] if matches else None)
    return Grade(run_program(f"{output}\n{gold}\n", trust=trust).passed, output)


def gold_number(name: str, gold: str) -> str:
    """The number of a gold answer, bare or as the answers of ``name`` end ("... #### 18").

    Raises CoterieError where there is none.
    """
    matches = ANSWER_PATTERNS[name].findall(gold)
    number = matches[-1] if matches else gold.strip()
    if not re.fullmatch(r"-?\d+", number):
        raise CoterieError(f"{gold!r} is no whole number, nor does one stand at its end as usual")
    return number


def _open(name: str, options: TaskOptions) -> EmbeddedTask:
    if options.count < 1:
        raise CoterieError(f"{name}: {options.count} items; at least 1")
    if options.shots:
        raise CoterieError(f"{name} is asked without examples; {options.shots} shots were wanted")
    if name not in ANSWER_PATTERNS:
        require_backend(options.trust)
    return EmbeddedTask(name, options.count, options.seed, options.trust)


@cache
def _draw_problems(name: str, seed: int, count: int) -> tuple[Problem, ...]:
    rng = random.Random(f"{name}/{seed}")
    return tuple(draw_problem(MAKERS[name], rng, "test") for _ in range(count))
