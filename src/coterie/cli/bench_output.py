"""The tables, records and figures of ``coterie bench``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from coterie.cli import output
from coterie.errors import ConfigError
from coterie.lab.bench.answers import AnswerTiming
from coterie.lab.bench.forward import READ, ROOFLINE, ForwardTiming
from coterie.lab.bench.layer import LayerBenchResult
from coterie.lab.journal import Journal
from coterie.lab.machine import machine_info
from coterie.lab.records import (
    Measurement,
    git_commit,
    package_versions,
    record_path,
    write_record,
)
from coterie.offload.capacity import format_bytes

RECORDS = Path("runs/bench")


@dataclass(frozen=True)
class RecordOptions:
    """Where the record of a benchmark goes, and what is printed."""

    out: Path = RECORDS
    overwrite: bool = False
    json: bool = False

    @contextmanager
    def journal(self, title: str, options: Mapping[str, object]) -> Iterator[Journal]:
        """The journal of a record's repeats; raises ConfigError if the record exists already.

        The same command goes on from it. It is removed once the record and its figures are written,
        so a record beside a journal is not complete.
        """
        record = record_path(self.out, title)
        file = record.with_suffix(".journal")
        if record.exists() and not self.overwrite and not file.exists():
            raise ConfigError(
                f"{record}: exists already; --overwrite replaces it, --out moves the new one"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        same = {"commit": git_commit(), "machine": machine_info(), "versions": package_versions()}
        with output.resumable(Journal(file, {**options, **same})) as journal:
            yield journal
            journal.remove()

    def report(
        self,
        table: Table,
        title: str,
        measures: Sequence[Measurement],
        facts: output.Document,
        device: str = "cpu",
    ) -> None:
        """Prints the record or the table, then writes it, and figures if matplotlib is there."""
        content = output.command_record(title, facts, measures, device)
        output.print_result(content, table, json=self.json)
        path = write_record(self.out, content)
        try:
            output.print_note(f"{path}, {', '.join(file.name for file in plot_record(path))}")
        except ConfigError as error:
            output.print_note(f"{path}; {error}")


def plot_record(path: Path) -> list[Path]:
    """Draws the figures of a record, next to it."""
    return output.require_extra("coterie.lab.bench.plots", "a figure").plot_record(path)


def layer_table(result: LayerBenchResult) -> Table:
    rows = []
    for timing in result.timings:
        for kernel in sorted(timing.samples, key=timing.median):
            error, median = result.errors.get(kernel), timing.median(kernel)
            rate = f", {timing.bytes / median / 1e9:.1f} GB/s" if kernel == "read" else ""
            cells = (f"{median * 1e3:.2f}", f"{timing.ratio_to_ours(kernel):.2f}")
            error_cell = "" if error is None else f"{error:.2%}"
            rows.append((timing.policy, kernel + rate, f"{timing.experts:.1f}", *cells, error_cell))
    numbers = ("experts", "ms", "times ours", "error")
    return output.plain_table("policy", "kernel", numbers=numbers, rows=rows)


def forward_table(timings: Sequence[ForwardTiming]) -> Table:
    sizes = ("experts a layer", "bytes", "GB/s")
    times = ("read, ms", "roofline, ms", "forward, ms", "times the read", "times the roofline")
    rows = []
    for timing in timings:
        read, roofline, forward = (measure.median for measure in timing.measures())
        rates = (
            f"{timing.bytes / read / 1e6:.1f}",
            *(f"{t:.1f}" for t in (read, roofline, forward)),
        )
        ratios = (f"{timing.times(READ):.2f}", f"{timing.times(ROOFLINE):.2f}")
        size = format_bytes(round(timing.bytes))
        rows.append((timing.policy, f"{timing.experts:.1f}", size, *rates, *ratios))
    return output.plain_table("policy", numbers=(*sizes, *times), rows=rows)


def generation_table(timings: Sequence[AnswerTiming]) -> Table:
    rows = []
    for timing in timings:
        counts, speed = timing.facts(timings[0]), timing.measure()
        rows.append((
            timing.policy, f"{speed.median:.1f}", f"{speed.spread:.1f}",
            f"{counts['experts_mean']:.1f} of {counts['experts_total']}", str(counts["forwards"]),
            f"{counts['forwards_per_block']:.1f}",
            f"{counts['texts_as_vanilla']} of {len(timing.repeats[0]['tokens'])}",
        ))  # fmt: skip
    numbers = ("tokens/s", "spread", "experts", "forwards", "forwards/block", "texts as vanilla")
    return output.plain_table("policy", numbers=numbers, rows=rows)


def concurrency_table(timings: Sequence[AnswerTiming], facts: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for timing, counts in zip(timings, facts, strict=True):
        speed, size = timing.measure(), format_bytes(round(counts["expert_bytes_per_token"]))
        rows.append((
            timing.policy, str(timing.rows), f"{speed.median:.1f}", f"{speed.spread:.1f}",
            f"{counts['speedup']:.2f}", f"{counts['experts']:.1f} of {counts['experts_total']}",
            size, f"{counts['texts_as_alone']} of {len(timing.repeats[0]['tokens'])}",
        ))  # fmt: skip
    speeds = ("rows", "tokens/s", "spread", "times one row")
    counts = ("experts a layer", "expert bytes a token", "texts as alone")
    return output.plain_table("policy", numbers=(*speeds, *counts), rows=rows)
