"""What ``coterie bench`` shows and keeps: tables, records, figures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from rich.table import Table

from coterie.cli.json_output import print_document
from coterie.cli.tables import console, format_bytes, plain_table, print_note
from coterie.errors import CoterieError
from coterie.lab.bench import forward as forwards
from coterie.lab.bench import generate as answers
from coterie.lab.bench.interleaved import LayerBenchResult
from coterie.lab.records import Measurement, make_record, write_record

JsonContent = dict[str, object]


def save_record(
    out: Path,
    title: str,
    measures: Sequence[Measurement],
    facts: Mapping[str, object],
    device: str = "cpu",
) -> JsonContent:
    """The record, written, and its figures where they can be drawn."""
    content = make_record(title, ["coterie", *sys.argv[1:]], measures, facts=facts, device=device)
    path = write_record(out, content)
    try:
        figures = ", ".join(file.name for file in plot_record(path))
        print_note(f"{path}, {figures}")
    except CoterieError as error:
        print_note(f"{path}; {error}")
    return content


def plot_record(path: Path) -> list[Path]:
    """Here and not above, for matplotlib is of an extra."""
    try:
        plotting = import_module("coterie.lab.bench.plots")
    except ModuleNotFoundError as error:
        raise CoterieError(
            f"a figure needs {error.name}, which is not installed: pip install 'coterie[lab]'"
        ) from None
    return plotting.plot_record(path)


def print_report(content: JsonContent, table: Table, *, json: bool) -> None:
    if json:
        print_document(content)
    else:
        console().print(table)


def layer_table(result: LayerBenchResult) -> Table:
    number_columns = ("experts", "ms", "times ours", "off by")
    table = plain_table("policy", "work", *number_columns, number_columns=number_columns)
    for timing in result.timings:
        for kernel in sorted(timing.samples, key=timing.median):
            error = result.errors.get(kernel)
            table.add_row(
                timing.policy,
                f"{kernel}, {timing.bytes / timing.median(kernel) / 1e9:.1f} GB/s"
                if kernel == "read"
                else kernel,
                f"{timing.experts:.1f}",
                f"{timing.median(kernel) * 1e3:.2f}",
                f"{timing.ratio_to_ours(kernel):.2f}",
                "" if error is None else f"{error:.2%}",
            )
    return table


def forward_table(timings: Sequence[forwards.ForwardTiming]) -> Table:
    number_columns = (
        "experts a layer", "bytes", "GB/s", "read, ms", "floor, ms", "forward, ms",
        "times the read", "times the floor",
    )  # fmt: skip
    table = plain_table("policy", *number_columns, number_columns=number_columns)
    for timing in timings:
        read, roofline, forward = timing.measures()
        table.add_row(
            timing.policy,
            f"{timing.experts:.1f}",
            format_bytes(round(timing.bytes)),
            f"{timing.bytes / read.median / 1e6:.1f}",
            f"{read.median:.1f}",
            f"{roofline.median:.1f}",
            f"{forward.median:.1f}",
            f"{timing.times_read:.2f}",
            f"{timing.times_roofline:.2f}",
        )
    return table


def generation_table(timings: Sequence[answers.GenerationTiming]) -> Table:
    number_columns = ("tokens/s", "spread", "experts", "forwards", "a block", "texts as vanilla")
    table = plain_table("policy", *number_columns, number_columns=number_columns)
    for timing in timings:
        counts, speed = timing.facts(timings[0]), timing.measure()
        table.add_row(
            timing.policy,
            f"{speed.median:.1f}",
            f"{speed.spread:.1f}",
            f"{counts['experts_mean']:.1f} of {counts['experts_total']}",
            str(counts["forwards"]),
            f"{counts['forwards_per_block']:.1f}",
            f"{counts['texts_as_vanilla']} of {len(timing.repeats[0])}",
        )
    return table
