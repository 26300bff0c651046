"""A benchmark: its items, their prompts and how answers are graded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coterie.errors import TaskError

QUESTION = "{question}"  # in a template


@dataclass(frozen=True)
class Item:
    """One problem. ``id`` is stable across versions: "HumanEval/0", "gsm8k/17".

    ``gold`` is the reference for the grader: a number, LaTeX, or a program that tests an answer.
    """

    id: str
    question: str
    gold: str


@dataclass(frozen=True)
class Grade:
    """The grade of one output. ``extracted`` is the answer read from it, None if there is none.

    ``other_metrics`` holds a task's further measures ("flexible": True).
    """

    correct: bool
    extracted: str | None
    other_metrics: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A benchmark with all options resolved that affect its prompts and grades.

    ``grader`` grades any output of an item; it never raises because of its content. ``about`` are
    settings for records: shots, extraction, data. One without "template" gets that of the prompts.
    """

    name: str
    questions: tuple[Item, ...]  # in the benchmark's order
    template: str
    grader: Callable[[str, Item], Grade]
    about: Mapping[str, object]
    max_new_tokens: int | None = None  # None: the engine's default
    samples: int = 0  # above 0, the gold's choices are compared by likelihood, from so many samples

    def settings(self) -> Mapping[str, object]:
        """The options as JSON values, for records."""
        return {"template": self.template, **self.about}

    def generation(self) -> Mapping[str, object]:
        """The benchmark's default fields of ``GenerationConfig``."""
        return {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}

    def items(self) -> Sequence[Item]:
        return self.questions

    def prompt(self, item: Item) -> str:
        """The prompt, without a chat template."""
        return self.template.replace(QUESTION, item.question)

    def grade(self, output: str, item: Item) -> Grade:
        return self.grader(output, item)

    def with_cached_grades(self) -> Task:
        """Policies often give the same output, and code is slow to run."""
        grades: dict[tuple[str, str], Grade] = {}

        def grade(output: str, item: Item) -> Grade:
            if (item.id, output) not in grades:
                grades[item.id, output] = self.grader(output, item)
            return grades[item.id, output]

        return replace(self, grader=grade)


@dataclass(frozen=True)
class TaskOptions:
    """Options of a task; None selects the benchmark's default for the model family.

    ``data`` is a file, or a folder with the benchmark's published layout. ``family`` selects
    defaults ("llada-moe": few shots, "llada2": none). ``count`` and ``seed`` apply to tasks with
    generated items. ``trust`` runs generated code unsandboxed if no sandbox works. ``samples`` are
    the corruptions of each block where a task compares likelihoods.
    """

    family: str
    data: Path | None = None
    shots: int | None = None
    count: int = 100
    seed: int = 1
    trust: bool = False
    samples: int = 8

    def require_zero_shot(self, task: str) -> None:
        """Raises TaskError if examples are requested of a task that has none."""
        if self.shots:
            raise TaskError(f"{task} is zero-shot; `shots` is {self.shots}")
