"""What a benchmark is to the lab: items, how one is asked, and how its answer is graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Item:
    """One question. ``id`` is the task's own and never changes: "HumanEval/0", "gsm8k/17".

    ``gold`` is what a grader compares with: a number, LaTeX, or the program that tests an answer.
    """

    id: str
    question: str
    gold: str


@dataclass(frozen=True)
class Grade:
    """What came of one output; ``extracted`` is what was read out of it (None: nothing found).

    ``also`` holds a task's other measures beside the one that counts ("flexible": True).
    """

    correct: bool
    extracted: str | None
    other_metrics: Mapping[str, bool] = field(default_factory=dict)


class Task(Protocol):
    """One benchmark, with every choice made that decides its prompts and grades."""

    @property
    def name(self) -> str: ...

    def settings(self) -> Mapping[str, object]:
        """Those choices as JSON values, for the record: shots, template, extraction, sources."""
        ...

    def generation(self) -> Mapping[str, object]:
        """Fields of ``Generation`` that the benchmark is usually run with (``max_new_tokens``)."""
        ...

    def items(self) -> Sequence[Item]:
        """All of them, in the benchmark's own order."""
        ...

    def prompt(self, item: Item) -> str:
        """What the model is asked, before its chat template."""
        ...

    def grade(self, output: str, item: Item) -> Grade:
        """Never raises for an output, whatever it holds."""
        ...


@dataclass(frozen=True)
class TaskOptions:
    """What a person may ask of a task; None is the benchmark's usual choice for the family.

    ``data`` is a file, or a folder laid out as the benchmark publishes it; ``family`` decides
    what is usual ("llada-moe": few shots, "llada2": none); ``count`` and ``seed`` are for tasks
    that draw their items. ``trust`` lets generated code run where no sandbox can be had.
    """

    family: str
    data: Path | None = None
    shots: int | None = None
    count: int = 100
    seed: int = 1
    trust: bool = False
