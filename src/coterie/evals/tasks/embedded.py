r"""The four kinds of small problems that the model in the package solves, as benchmarks."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from coterie.evals.task import Grade, Item, Task, Wish
from coterie.naming import CoterieError
from coterie.problems import TASKS as MAKERS
from coterie.problems import Problem, draw
from coterie.sandbox import require_fence, run

NUMBERED = {  # the last of these in the output is its answer
    "words": re.compile(r"####\s*(-?\d+)"),
    "algebra": re.compile(r"\\boxed\{\s*(-?\d+)\s*\}"),
}


@dataclass(frozen=True)
class Embedded:
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
            "counts": NUMBERED[self.name].pattern if self.name in NUMBERED else "asserts pass",
        }

    def generation(self) -> Mapping[str, object]:
        """The model's own defaults: it was trained with them."""
        return {}

    def items(self) -> Sequence[Item]:
        return [
            Item(f"{self.name}/{self.seed}/{number}", problem.prompt, problem.gold)
            for number, problem in enumerate(_drawn(self.name, self.seed, self.count))
        ]

    def prompt(self, item: Item) -> str:
        return item.question

    def grade(self, output: str, item: Item) -> Grade:
        return grade(self.name, output, item.gold, trust=self.trust)


def opener(name: str) -> Callable[[Wish], Task]:
    """What opens the kind ``name``."""
    return partial(_open, name)


def grade(name: str, output: str, gold: str, *, trust: bool = False) -> Grade:
    """Of an output of the kind ``name``; ``gold`` is a number, or asserts that follow the code.

    Raises CoterieError for code, where nothing can keep it in and it is not trusted.
    """
    if name in NUMBERED:
        found = NUMBERED[name].findall(output)
        right = bare(name, gold)
        return Grade(bool(found) and found[-1] == right, found[-1] if found else None)
    return Grade(run(f"{output}\n{gold}\n", trust=trust).passed, output)


def bare(name: str, gold: str) -> str:
    """The number of a gold answer, bare or as the answers of ``name`` end ("... #### 18").

    Raises CoterieError where there is none.
    """
    marked = NUMBERED[name].findall(gold)
    number = marked[-1] if marked else gold.strip()
    if not re.fullmatch(r"-?\d+", number):
        raise CoterieError(f"{gold!r} is no whole number, nor does one stand at its end as usual")
    return number


def _open(name: str, wish: Wish) -> Embedded:
    if wish.count < 1:
        raise CoterieError(f"{name}: {wish.count} items; at least 1")
    if wish.shots:
        raise CoterieError(f"{name} is asked without examples; {wish.shots} shots were wanted")
    if name not in NUMBERED:
        require_fence(wish.trust)
    return Embedded(name, wish.count, wish.seed, wish.trust)


@cache
def _drawn(name: str, seed: int, count: int) -> tuple[Problem, ...]:
    rng = random.Random(f"{name}/{seed}")
    return tuple(draw(MAKERS[name], rng, "test") for _ in range(count))
