"""A task with cached grades: policies often give the same output, and code is slow to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coterie.lab.evals.task import Grade, Item, Task


@dataclass(frozen=True)
class CachedGradesTask:
    """A task that grades the same output of the same item once."""

    task: Task
    grades: dict[tuple[str, str], Grade] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.task.name

    def settings(self) -> Mapping[str, object]:
        return self.task.settings()

    def generation(self) -> Mapping[str, object]:
        return self.task.generation()

    def items(self) -> Sequence[Item]:
        return self.task.items()

    def prompt(self, item: Item) -> str:
        return self.task.prompt(item)

    def grade(self, output: str, item: Item) -> Grade:
        cached = self.grades.get((item.id, output))
        if cached is None:
            cached = self.grades[item.id, output] = self.task.grade(output, item)
        return cached
