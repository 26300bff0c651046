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
from coterie.evals.journal import Answer


@dataclass  # not frozen: it is what the eye sees now
class Standing:
    """``total`` answers are wanted of ``arms``, the first of which the others are held against."""

    arms: Sequence[str]
    total: int
    right: dict[str, dict[tuple[str, str], bool]] = field(default_factory=dict)
    failed: int = 0
    found: int = 0
    progress: Progress = field(default_factory=lambda: Progress(*COLUMNS))

    def __post_init__(self) -> None:
        self.bar = self.progress.add_task("", total=self.total)

    @property
    def count(self) -> int:
        """Answers so far, those found among them."""
        return sum(len(answers) for answers in self.right.values())

    def take(self, answer: Answer) -> None:
        """One more answer; those found do not count as speed."""
        self.right.setdefault(answer.arm, {})[answer.task, answer.id] = answer.correct
        self.failed += answer.error is not None
        self.found += answer.found
        if answer.found:
            self.progress.reset(self.bar, completed=self.count)
        else:
            self.progress.update(self.bar, completed=self.count)

    def __rich__(self) -> Group:
        # The bar first: where a terminal is low, the last lines are the ones cut off.
        return Group(self.progress, self._scores())

    def _scores(self) -> Table:
        numbers = ("right so far", "against the first")
        table = plain_table("policy", *numbers, numbers=numbers)
        table.columns[0].overflow = "fold"
        for arm in self.arms:
            answers = self.right.get(arm, {})
            if answers:
                share = f"{fmean(answers.values()):.1%} of {len(answers)}"
                table.add_row(arm, share, self._against_first(answers))
        return table

    def _against_first(self, answers: dict[tuple[str, str], bool]) -> str:
        """The difference on the items that both have answered."""
        first = self.right.get(self.arms[0], {})
        both = [int(right) - int(first[key]) for key, right in answers.items() if key in first]
        return f"{fmean(both):+.1%}" if both and answers is not first else ""


@contextmanager
def shown(standing: Standing) -> Iterator[None]:
    """Draws it on stderr until the end; where that is no terminal, nothing."""
    to = console(stderr=True)
    if not to.is_terminal:
        yield
        return
    with Live(standing, console=to, transient=True, refresh_per_second=4):
        yield


COLUMNS = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
