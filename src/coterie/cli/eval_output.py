"""What an evaluation came to: as tables, as one JSON document, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from coterie.cli.tables import format_bytes, plain_table
from coterie.lab.evals.report import PolicySummary

Columns = dict[str, Callable[[PolicySummary], str]]


def accuracy_document(
    model: str, about: Mapping[str, object], summaries: Sequence[PolicySummary], **options: object
) -> dict[str, object]:
    """What was asked of which model, with every choice of the tasks, and what came of it."""
    return {
        "model": model,
        **options,
        "run": dict(about),
        "policies": [summary.to_dict() for summary in summaries],
    }


def accuracy_tables(summaries: Sequence[PolicySummary], terminal: Console) -> list[Table]:
    """One policy a line: what was right and how it changed, then what that cost.

    Experts and bytes are a layer's in one decoding forward. What was moved, where not all experts
    are in memory, is all layers'; saved is a share of what the first policy moved for the same
    items. Where a line is too long for the terminal there are more and narrower tables.
    """
    task_columns = _task_columns(summaries)
    transfer_columns = {} if summaries[0].result.traffic is None else TRANSFER_COLUMNS
    wide_tables = [
        _table(summaries, ACCURACY_COLUMNS | task_columns | CHANGE_COLUMNS),
        _table(summaries, EXPERT_COLUMNS | transfer_columns | SPEED_COLUMNS),
    ]
    if max(_natural_width(table, terminal) for table in wide_tables) <= terminal.width:
        return wide_tables
    return [
        _table(summaries, columns)
        for columns in (
            ACCURACY_COLUMNS,
            task_columns,
            CHANGE_COLUMNS,
            EXPERT_COLUMNS,
            transfer_columns,
            SPEED_COLUMNS,
        )
        if columns
    ]


def _task_columns(summaries: Sequence[PolicySummary]) -> Columns:
    """By task, where there are several, and a task's other measures."""
    tasks = list(summaries[0].by_task)
    metrics = [*(tasks if len(tasks) > 1 else ()), *summaries[0].other_metrics]
    return {metric: partial(_format_metric, metric) for metric in metrics}


def _format_metric(name: str, summary: PolicySummary) -> str:
    share = {**summary.by_task, **summary.other_metrics}.get(name)
    return "" if share is None else f"{share.value:.1%}"


def _table(summaries: Sequence[PolicySummary], columns: Columns) -> Table:
    table = plain_table("policy", *columns, number_columns=tuple(columns))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    for summary in summaries:
        table.add_row(
            summary.result.policy, *(format_cell(summary) for format_cell in columns.values())
        )
    return table


def _natural_width(table: Table, terminal: Console) -> int:
    """Columns that it takes where nothing wraps."""
    return terminal.measure(table, options=terminal.options.update(max_width=10_000)).maximum


def _format_interval(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.1%} to {high:{sign}.1%}"


def accuracy_csv(summaries: Sequence[PolicySummary]) -> str:
    """One policy a line, numbers in full; columns of the first policy's change stay empty."""
    rows = [_csv_row(summary) for summary in summaries]
    output = io.StringIO()
    writer = csv.DictWriter(output, list(dict.fromkeys(k for row in rows for k in row)))
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()


def _csv_row(summary: PolicySummary) -> dict[str, object]:
    change, eval_result = summary.change, summary.result
    low, high = summary.accuracy.interval
    return {
        "policy": eval_result.policy,
        "right": summary.accuracy.successes,
        "n": summary.accuracy.n,
        "accuracy": summary.accuracy.value,
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"accuracy {name}": share.value for name, share in summary.by_task.items()},
        **{f"accuracy {name}": share.value for name, share in summary.other_metrics.items()},
        "change": None if change is None else change.difference,
        "change_low": None if change is None else change.interval[0],
        "change_high": None if change is None else change.interval[1],
        "gained": None if change is None else change.gained,
        "lost": None if change is None else change.lost,
        "p": None if change is None else change.p_value,
        "p_holm": summary.p_holm,
        "relative_accuracy": summary.relative_accuracy,
        "failed": eval_result.num_failed,
        "experts": eval_result.experts,
        "expert_bytes": eval_result.expert_bytes,
        "vote_mass_kept": eval_result.vote_mass_kept,
        "forwards_per_block": eval_result.forwards_per_block,
        "new_tokens": eval_result.new_tokens,
        "tokens_per_second": eval_result.tokens_per_second,
        "seconds": eval_result.seconds,
        **_transfer_cells(summary),
    }


def _transfer_cells(summary: PolicySummary) -> dict[str, object]:
    """Nothing where all experts are in memory."""
    traffic, saved = summary.result.traffic, summary.savings
    if traffic is None:
        return {}
    low, high = (None, None) if saved is None else saved.interval
    return {
        "experts_used": traffic.used,
        "hit_rate": traffic.hit_rate,
        "bytes_moved": traffic.bytes_moved,
        "bytes_without_cache": traffic.bytes_without_cache,
        "bytes_of_vanilla_on_same_forwards": traffic.bytes_vanilla,
        "moved_a_forward": summary.result.bytes_per_forward,
        "saved": None if saved is None else saved.value,
        "saved_low": low,
        "saved_high": high,
        "stall_seconds": traffic.wait_seconds,
    }


ACCURACY_COLUMNS: Columns = {
    "right": lambda line: f"{line.accuracy.value:.1%} of {line.accuracy.n}",
    "95 %": lambda line: _format_interval(*line.accuracy.interval),
}
CHANGE_COLUMNS: Columns = {
    "change": lambda line: "" if line.change is None else f"{line.change.difference:+.1%}",
    "change, 95 %": lambda line: (
        "" if line.change is None else _format_interval(*line.change.interval, sign="+")
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
    "hits": lambda line: "" if (one := line.result.traffic) is None else f"{one.hit_rate:.1%}",
    "moved/forward": lambda line: format_bytes(line.result.bytes_per_forward),
    "saved": lambda line: "" if line.savings is None else f"{line.savings.value:.1%}",
    "saved, 95 %": lambda line: (
        "" if line.savings is None else _format_interval(*line.savings.interval)
    ),
}
SPEED_COLUMNS: Columns = {
    "forwards/block": lambda line: f"{line.result.forwards_per_block:.2f}",
    "tokens/s": lambda line: f"{line.result.tokens_per_second:.1f}",
}
