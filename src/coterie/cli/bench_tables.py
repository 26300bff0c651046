"""What ``coterie bench`` shows and keeps: tables, records, figures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from rich.table import Table

from coterie.bench import forward as forwards
from coterie.bench import generate as answers
from coterie.bench.turns import Found
from coterie.cli.document import print_document
from coterie.cli.tables import console, plain_table, readable, remark
from coterie.naming import CoterieError
from coterie.results import Measure, record, write_record

Content = dict[str, object]


def keep(
    out: Path,
    title: str,
    measures: Sequence[Measure],
    facts: Mapping[str, object],
    device: str = "cpu",
) -> Content:
    """The record, written, and its figures where they can be drawn."""
    content = record(title, ["coterie", *sys.argv[1:]], measures, facts=facts, device=device)
    path = write_record(out, content)
    try:
        figures = ", ".join(file.name for file in plot(path))
        remark(f"{path}, {figures}")
    except CoterieError as error:
        remark(f"{path}; {error}")
    return content


def plot(path: Path) -> list[Path]:
    """Here and not above, for matplotlib is of an extra."""
    try:
        room = import_module("coterie.bench.plots")
    except ModuleNotFoundError as error:
        raise CoterieError(
            f"a figure needs {error.name}, which is not installed: pip install 'coterie[lab]'"
        ) from None
    return room.plot(path)


def show(content: Content, table: Table, *, json: bool) -> None:
    if json:
        print_document(content)
    else:
        console().print(table)


def layer_table(found: Found) -> Table:
    numbers = ("experts", "ms", "times ours", "off by")
    table = plain_table("policy", "work", *numbers, numbers=numbers)
    for line in found.lines:
        for work in sorted(line.samples, key=line.median):
            error = found.errors.get(work)
            table.add_row(
                line.policy,
                f"{work}, {line.bytes / line.median(work) / 1e9:.1f} GB/s"
                if work == "read"
                else work,
                f"{line.experts:.1f}",
                f"{line.median(work) * 1e3:.2f}",
                f"{line.ratio(work):.2f}",
                "" if error is None else f"{error:.2%}",
            )
    return table


def forward_table(lines: Sequence[forwards.Line]) -> Table:
    numbers = (
        "experts a layer", "bytes", "GB/s", "read, ms", "floor, ms", "forward, ms",
        "times the read", "times the floor",
    )  # fmt: skip
    table = plain_table("policy", *numbers, numbers=numbers)
    for line in lines:
        read, least, whole = line.measures()
        table.add_row(
            line.policy,
            f"{line.experts:.1f}",
            readable(round(line.bytes)),
            f"{line.bytes / read.median / 1e6:.1f}",
            f"{read.median:.1f}",
            f"{least.median:.1f}",
            f"{whole.median:.1f}",
            f"{line.times_limit:.2f}",
            f"{line.times_floor:.2f}",
        )
    return table


def generation_table(lines: Sequence[answers.Line]) -> Table:
    numbers = ("tokens/s", "spread", "experts", "forwards", "a block", "texts as vanilla")
    table = plain_table("policy", *numbers, numbers=numbers)
    for line in lines:
        counted, speed = line.facts(lines[0]), line.measure()
        table.add_row(
            line.policy,
            f"{speed.median:.1f}",
            f"{speed.spread:.1f}",
            f"{counted['experts_mean']:.1f} of {counted['experts_total']}",
            str(counted["forwards"]),
            f"{counted['forwards_per_block']:.1f}",
            f"{counted['texts_as_vanilla']} of {len(line.turns[0])}",
        )
    return table
