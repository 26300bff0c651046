"""How an evaluation stands while it runs: how far it is, and every policy's accuracy so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from coterie.cli.tables import console, plain_table
from coterie.lab.evals.answer_log import Answer


@dataclass  # not frozen: it is what the eye sees now
class EvalProgress:
    """``total`` answers are wanted of ``arms``, the first of which the others are held against."""

    variants: Sequence[str]
    total: int
    correct: dict[str, dict[tuple[str, str], bool]] = field(default_factory=dict)
    failed: int = 0
    resumed: int = 0
    progress: Progress = field(default_factory=lambda: Progress(*PROGRESS_COLUMNS))

    def __post_init__(self) -> None:
        self.task_id = self.progress.add_task("", total=self.total)

    @property
    def count(self) -> int:
        """Answers so far, those found among them."""
        return sum(len(answers) for answers in self.correct.values())

    def add(self, answer: Answer) -> None:
        """One more answer; those found do not count as speed."""
        self.correct.setdefault(answer.variant, {})[answer.task, answer.id] = answer.correct
        self.failed += answer.error is not None
        self.resumed += answer.from_disk
        if answer.from_disk:
            self.progress.reset(self.task_id, completed=self.count)
        else:
            self.progress.update(self.task_id, completed=self.count)

    def __rich__(self) -> Group:
        # The bar first: where a terminal is low, the last lines are the ones cut off.
        return Group(self.progress, self._scores())

    def _scores(self) -> Table:
        number_columns = ("right so far", "against the first")
        table = plain_table("policy", *number_columns, number_columns=number_columns)
        table.columns[0].overflow = "fold"
        for variant in self.variants:
            answers = self.correct.get(variant, {})
            if answers:
                accuracy = f"{fmean(answers.values()):.1%} of {len(answers)}"
                table.add_row(variant, accuracy, self._difference_to_first(answers))
        return table

    def _difference_to_first(self, answers: dict[tuple[str, str], bool]) -> str:
        """The difference on the items that both have answered."""
        first = self.correct.get(self.variants[0], {})
        differences = [
            int(is_correct) - int(first[key]) for key, is_correct in answers.items() if key in first
        ]
        return f"{fmean(differences):+.1%}" if differences and answers is not first else ""


@contextmanager
def live_progress(progress: EvalProgress) -> Iterator[None]:
    """Draws it on stderr until the end; where that is no terminal, nothing."""
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        yield
        return
    with Live(progress, console=terminal, transient=True, refresh_per_second=4):
        yield


PROGRESS_COLUMNS = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
