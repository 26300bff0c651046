"""What an evaluation came to: as tables, as one JSON document, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from coterie.cli.tables import plain_table, readable
from coterie.evals.report import Line

Columns = dict[str, Callable[[Line], str]]


def accuracy_document(
    model: str, about: Mapping[str, object], found: Sequence[Line], **asked: object
) -> dict[str, object]:
    """What was asked of which model, with every choice of the tasks, and what came of it."""
    return {
        "model": model,
        **asked,
        "run": dict(about),
        "policies": [line.document() for line in found],
    }


def accuracy_tables(found: Sequence[Line], to: Console) -> list[Table]:
    """One policy a line: what was right and how it changed, then what that cost.

    Experts and bytes are a layer's in one decoding forward. What was moved, where not all experts
    are in memory, is all layers'; saved is a share of what the first policy moved for the same
    items. Where a line is too long for the terminal there are more and narrower tables.
    """
    parts = _by_part(found)
    moved = {} if found[0].sheet.served is None else MOVED
    wide = [_table(found, RIGHT | parts | CHANGE), _table(found, TRAFFIC | moved | PACE)]
    if max(_width(table, to) for table in wide) <= to.width:
        return wide
    return [_table(found, part) for part in (RIGHT, parts, CHANGE, TRAFFIC, moved, PACE) if part]


def _by_part(found: Sequence[Line]) -> Columns:
    """By task, where there are several, and a task's other measures."""
    tasks = list(found[0].by_task)
    parts = [*(tasks if len(tasks) > 1 else ()), *found[0].also]
    return {part: partial(_part, part) for part in parts}


def _part(name: str, line: Line) -> str:
    share = {**line.by_task, **line.also}.get(name)
    return "" if share is None else f"{share.value:.1%}"


def _table(found: Sequence[Line], columns: Columns) -> Table:
    table = plain_table("policy", *columns, numbers=tuple(columns))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    for line in found:
        table.add_row(line.sheet.policy, *(told(line) for told in columns.values()))
    return table


def _width(table: Table, to: Console) -> int:
    """Columns that it takes where nothing wraps."""
    return to.measure(table, options=to.options.update(max_width=10_000)).maximum


def _interval(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.1%} to {high:{sign}.1%}"


def accuracy_csv(found: Sequence[Line]) -> str:
    """One policy a line, numbers in full; columns of the first policy's change stay empty."""
    rows = [_row(line) for line in found]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(dict.fromkeys(k for row in rows for k in row)))
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def _row(line: Line) -> dict[str, object]:
    change, sheet = line.change, line.sheet
    low, high = line.whole.interval
    return {
        "policy": sheet.policy,
        "right": line.whole.right,
        "n": line.whole.n,
        "accuracy": line.whole.value,
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"accuracy {name}": share.value for name, share in line.by_task.items()},
        **{f"accuracy {name}": share.value for name, share in line.also.items()},
        "change": None if change is None else change.difference,
        "change_low": None if change is None else change.interval[0],
        "change_high": None if change is None else change.interval[1],
        "gained": None if change is None else change.gained,
        "lost": None if change is None else change.lost,
        "p": None if change is None else change.p,
        "p_holm": line.p_holm,
        "relative_accuracy": line.relative,
        "failed": sheet.failed,
        "experts": sheet.experts,
        "expert_bytes": sheet.expert_bytes,
        "vote_mass_kept": sheet.vote_mass_kept,
        "forwards_per_block": sheet.forwards_per_block,
        "new_tokens": sheet.new_tokens,
        "tokens_per_second": sheet.tokens_per_second,
        "seconds": sheet.seconds,
        **_moved(line),
    }


def _moved(line: Line) -> dict[str, object]:
    """Nothing where all experts are in memory."""
    served, saved = line.sheet.served, line.saved
    if served is None:
        return {}
    low, high = (None, None) if saved is None else saved.interval
    return {
        "experts_used": served.used,
        "hit_rate": served.hit_rate,
        "bytes_moved": served.moved,
        "bytes_without_cache": served.without_cache,
        "bytes_of_vanilla_on_same_forwards": served.vanilla,
        "moved_a_forward": line.sheet.moved_a_forward,
        "saved": None if saved is None else saved.value,
        "saved_low": low,
        "saved_high": high,
        "stall_seconds": served.waited,
    }


RIGHT: Columns = {
    "right": lambda line: f"{line.whole.value:.1%} of {line.whole.n}",
    "95 %": lambda line: _interval(*line.whole.interval),
}
CHANGE: Columns = {
    "change": lambda line: "" if line.change is None else f"{line.change.difference:+.1%}",
    "change, 95 %": lambda line: (
        "" if line.change is None else _interval(*line.change.interval, sign="+")
    ),
    "p": lambda line: "" if line.change is None else f"{line.change.p:.2g}",
    "relative": lambda line: "" if line.relative is None else f"{line.relative:.1%}",
}
TRAFFIC: Columns = {
    "experts": lambda line: f"{line.sheet.experts:.1f}",
    "bytes": lambda line: readable(line.sheet.expert_bytes),
    "votes kept": lambda line: f"{line.sheet.vote_mass_kept:.3f}",
}
MOVED: Columns = {
    "hits": lambda line: "" if (one := line.sheet.served) is None else f"{one.hit_rate:.1%}",
    "moved/forward": lambda line: readable(line.sheet.moved_a_forward),
    "saved": lambda line: "" if line.saved is None else f"{line.saved.value:.1%}",
    "saved, 95 %": lambda line: "" if line.saved is None else _interval(*line.saved.interval),
}
PACE: Columns = {
    "forwards/block": lambda line: f"{line.sheet.forwards_per_block:.2f}",
    "tokens/s": lambda line: f"{line.sheet.tokens_per_second:.1f}",
}
