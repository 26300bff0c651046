"""The results of an evaluation as tables, JSON and CSV."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from coterie.cli.output import plain_table
from coterie.lab.evals.report import PolicySummary
from coterie.offload.capacity import format_bytes

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
