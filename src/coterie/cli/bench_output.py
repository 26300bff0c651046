"""The tables, records and figures of ``coterie bench``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from coterie.cli import output
from coterie.errors import ConfigError
from coterie.lab.bench.forward import ForwardTiming
from coterie.lab.bench.generate import GenerationTiming
from coterie.lab.bench.interleaved import LayerBenchResult
from coterie.lab.records import Measurement, make_record, write_record
from coterie.offload.capacity import format_bytes

JsonContent = dict[str, object]


def save_record(
    out: Path,
    title: str,
    measures: Sequence[Measurement],
    facts: Mapping[str, object],
    device: str = "cpu",
) -> JsonContent:
    """Writes the record, and its figures where matplotlib is installed."""
    content = make_record(title, ["coterie", *sys.argv[1:]], measures, facts=facts, device=device)
    path = write_record(out, content)
    try:
        output.print_note(f"{path}, {', '.join(file.name for file in plot_record(path))}")
    except ConfigError as error:
        output.print_note(f"{path}; {error}")
    return content


def plot_record(path: Path) -> list[Path]:
    """Draws the figures of a record, next to it."""
    return output.require_extra("coterie.lab.bench.plots", "a figure").plot_record(path)


def print_report(content: JsonContent, table: Table, *, json: bool) -> None:
    if json:
        output.print_document(content)
    else:
        output.console().print(table)


def layer_table(result: LayerBenchResult) -> Table:
    table = output.plain_table("policy", "kernel", numbers=("experts", "ms", "times ours", "error"))
    for timing in result.timings:
        for kernel in sorted(timing.samples, key=timing.median):
            error, median = result.errors.get(kernel), timing.median(kernel)
            rate = f", {timing.bytes / median / 1e9:.1f} GB/s" if kernel == "read" else ""
            table.add_row(
                timing.policy,
                kernel + rate,
                f"{timing.experts:.1f}",
                f"{median * 1e3:.2f}",
                f"{timing.ratio_to_ours(kernel):.2f}",
                "" if error is None else f"{error:.2%}",
            )
    return table


def forward_table(timings: Sequence[ForwardTiming]) -> Table:
    sizes = ("experts a layer", "bytes", "GB/s")
    times = ("read, ms", "roofline, ms", "forward, ms", "times the read", "times the roofline")
    table = output.plain_table("policy", numbers=(*sizes, *times))
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


def generation_table(timings: Sequence[GenerationTiming]) -> Table:
    numbers = ("tokens/s", "spread", "experts", "forwards", "forwards/block", "texts as vanilla")
    table = output.plain_table("policy", numbers=numbers)
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
