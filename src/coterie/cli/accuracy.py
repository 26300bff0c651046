"""What an evaluation came to: as tables, as one JSON document, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from rich.table import Table

from coterie.cli.tables import plain_table, readable
from coterie.evals.report import Line


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


def accuracy_table(found: Sequence[Line]) -> Table:
    """Right answers, one policy a line; the change is against the first, on the same items."""
    tasks = list(found[0].by_task)
    # Of one task the whole says it all.
    parts = (*(tasks if len(tasks) > 1 else ()), *found[0].also)
    numbers = ("right", "95 %", *parts, "change", "change, 95 %", "p", "relative")
    table = plain_table("policy", *numbers, numbers=numbers)
    for line in found:
        low, high = line.whole.interval
        change = line.change
        told = ("", "", "") if change is None else (
            f"{change.difference:+.1%}",
            f"{change.interval[0]:+.1%} to {change.interval[1]:+.1%}",
            f"{change.p:.2g}",
        )  # fmt: skip
        shares = {**line.by_task, **line.also}
        table.add_row(
            line.sheet.policy,
            f"{line.whole.value:.1%} of {line.whole.n}",
            f"{low:.1%} to {high:.1%}",
            *(f"{shares[part].value:.1%}" if part in shares else "" for part in parts),
            *told,
            "" if line.relative is None else f"{line.relative:.1%}",
        )
    return table


def traffic_table(found: Sequence[Line]) -> Table:
    """What the same answers cost; experts and bytes are a layer's, in one decoding forward."""
    numbers = ("experts", "bytes", "votes kept", "forwards/block", "tokens/s")
    table = plain_table("policy", *numbers, numbers=numbers)
    for line in found:
        sheet = line.sheet
        table.add_row(
            sheet.policy,
            f"{sheet.experts:.1f}",
            readable(sheet.expert_bytes),
            f"{sheet.vote_mass_kept:.3f}",
            f"{sheet.forwards_per_block:.2f}",
            f"{sheet.tokens_per_second:.1f}",
        )
    return table


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
    }
