"""The output of an evaluation: its progress, and its results as tables and JSON."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from coterie.cli.output import console, plain_table
from coterie.lab.evals.answer_log import Answer
from coterie.lab.evals.report import PolicySummary
from coterie.offload.capacity import format_bytes

PROGRESS_COLUMNS = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
Columns = Mapping[str, Callable[[PolicySummary], str]]


def accuracy_document(
    model: str, about: Mapping[str, object], summaries: Sequence[PolicySummary]
) -> dict[str, object]:
    """The settings of the run and the result of each policy."""
    return {"model": model, "run": dict(about), "policies": [each.to_dict() for each in summaries]}


def accuracy_tables(summaries: Sequence[PolicySummary], terminal: Console) -> list[Table]:
    """One policy a line: its accuracy and the change, then its cost.

    Experts and bytes are of one layer in one decoding forward. Bytes moved are of all layers, and
    the share saved is of what the first policy moved for the same items. A narrow terminal gets
    more and narrower tables.
    """
    tasks = _task_columns(summaries)
    transfer = {} if summaries[0].result.traffic is None else TRANSFER_COLUMNS
    groups = [ACCURACY_COLUMNS, tasks, CHANGE_COLUMNS, EXPERT_COLUMNS, transfer, SPEED_COLUMNS]
    wide = [_table(summaries, {**a, **b, **c}) for a, b, c in (groups[:3], groups[3:])]
    options = terminal.options.update(max_width=10_000)  # no cell wraps
    if max(terminal.measure(table, options=options).maximum for table in wide) <= terminal.width:
        return wide
    return [_table(summaries, columns) for columns in groups if columns]


def _task_columns(summaries: Sequence[PolicySummary]) -> Columns:
    """One column for each task, where there are several, and for each other metric."""
    tasks = list(summaries[0].by_task)
    metrics = [*(tasks if len(tasks) > 1 else ()), *summaries[0].other_metrics]
    return {metric: partial(_format_metric, metric) for metric in metrics}


def _format_metric(name: str, summary: PolicySummary) -> str:
    share = {**summary.by_task, **summary.other_metrics}.get(name)
    return "" if share is None else f"{share.value:.1%}"


def _table(summaries: Sequence[PolicySummary], columns: Columns) -> Table:
    rows = [(s.result.policy, *(cell(s) for cell in columns.values())) for s in summaries]
    table = plain_table("policy", numbers=tuple(columns), rows=rows)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    return table


def _interval(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.1%} to {high:{sign}.1%}"


ACCURACY_COLUMNS: Columns = {
    "accuracy": lambda line: f"{line.accuracy.value:.1%} of {line.accuracy.n}",
    "95 %": lambda line: _interval(*line.accuracy.interval),
}
CHANGE_COLUMNS: Columns = {
    "change": lambda line: "" if line.change is None else f"{line.change.difference:+.1%}",
    "change, 95 %": lambda line: (
        "" if line.change is None else _interval(*line.change.interval, sign="+")
    ),
    "p": lambda line: "" if line.change is None else f"{line.change.p_value:.2g}",
    "relative": lambda line: (
        "" if line.relative_accuracy is None else f"{line.relative_accuracy:.1%}"
    ),
}
EXPERT_COLUMNS: Columns = {
    "experts": lambda line: f"{line.result.experts:.1f}",
    "bytes": lambda line: format_bytes(line.result.expert_bytes),
    "votes kept": lambda line: f"{line.result.vote_mass_kept:.3f}",
}
TRANSFER_COLUMNS: Columns = {
    "hit rate": lambda line: "" if (one := line.result.traffic) is None else f"{one.hit_rate:.1%}",
    "moved/forward": lambda line: format_bytes(line.result.bytes_per_forward),
    "bytes saved": lambda line: "" if line.savings is None else f"{line.savings.value:.1%}",
    "saved, 95 %": lambda line: "" if line.savings is None else _interval(*line.savings.interval),
}
SPEED_COLUMNS: Columns = {
    "forwards/block": lambda line: f"{line.result.forwards_per_block:.2f}",
    "tokens/s": lambda line: f"{line.result.tokens_per_second:.1f}",
}


@dataclass  # not frozen: each answer updates it
class EvalProgress:
    """Counts the answers of all variants; the others are compared with the first."""

    variants: Sequence[str]
    total: int
    correct: dict[str, dict[tuple[str, str], bool]] = field(default_factory=dict)
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
    live = Live(progress, console=terminal, transient=True, refresh_per_second=4)
    with live if terminal.is_terminal else nullcontext():
        yield
