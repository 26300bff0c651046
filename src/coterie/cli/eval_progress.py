"""The progress of an evaluation: answers so far, and the accuracy of each policy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from coterie.cli.output import console, plain_table
from coterie.lab.evals.answer_log import Answer

PROGRESS_COLUMNS = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))


@dataclass  # not frozen: each answer updates it
class EvalProgress:
    """Counts the answers of all variants; the others are compared with the first."""

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
        """Answers so far, with those of an earlier run."""
        return sum(len(answers) for answers in self.correct.values())

    def add(self, answer: Answer) -> None:
        """Adds an answer; one of an earlier run does not count for the speed."""
        self.correct.setdefault(answer.variant, {})[answer.task, answer.id] = answer.correct
        self.failed += answer.error is not None
        self.resumed += answer.from_disk
        if answer.from_disk:
            self.progress.reset(self.task_id, completed=self.count)
        else:
            self.progress.update(self.task_id, completed=self.count)

    def __rich__(self) -> Group:
        # The bar first: a low terminal cuts off the last lines.
        return Group(self.progress, self._scores())

    def _scores(self) -> Table:
        rows = []
        for variant in self.variants:
            if answers := self.correct.get(variant, {}):
                accuracy = f"{fmean(answers.values()):.1%} of {len(answers)}"
                rows.append((variant, accuracy, self._difference_to_first(answers)))
        numbers = ("correct so far", "against the first")
        table = plain_table("policy", numbers=numbers, rows=rows)
        table.columns[0].overflow = "fold"
        return table

    def _difference_to_first(self, answers: dict[tuple[str, str], bool]) -> str:
        """The difference on the items that both have answered."""
        first = self.correct.get(self.variants[0], {})
        common = [key for key in answers if key in first]
        differences = [int(answers[key]) - int(first[key]) for key in common]
        return f"{fmean(differences):+.1%}" if differences and answers is not first else ""


@contextmanager
def live_progress(progress: EvalProgress) -> Iterator[None]:
    """Draws it on stderr; silent where that is no terminal."""
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        yield
        return
    with Live(progress, console=terminal, transient=True, refresh_per_second=4):
        yield
