"""Figures of what was timed, from its record alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CoterieError
from coterie.lab.plotting import BACKGROUND, SERIES_COLOURS, add_legend, new_axes, render_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*"
ROW_HEIGHT = 0.27  # inches of height
KNOWN_TITLES = ("bench layer", "bench forward", "generate")


@dataclass(frozen=True)
class Chart:
    """Samples by row and series; rows are read downwards."""

    rows: Sequence[str]
    series: Sequence[str]
    samples: Mapping[tuple[str, str], Sequence[float]]
    unit: str


def plot_record(path: Path) -> list[Path]:
    """Writes the figures of a record beside it, for light and for dark paper."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        chart = make_chart(record)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CoterieError(f"{path}: no record of a bench ({error})") from None
    paths = []
    for scheme in BACKGROUND:
        file = path.with_name(f"{path.stem}-{scheme}.svg")
        svg = render_svg(lambda: draw_chart(chart), name=path.stem, scheme=scheme)
        file.write_text(svg + "\n", encoding="utf-8")
        paths.append(file)
    return paths


def make_chart(record: Mapping[str, Any]) -> Chart:
    """What a record shows; raises CoterieError for one of another kind."""
    title = record["title"]
    samples = {entry["name"]: entry["samples"] for entry in record["measures"]}
    if title.startswith("generate"):
        rows = list(samples)
        speeds = {(row, "tokens/s"): samples[row] for row in rows}
        return Chart(rows, ["tokens/s"], speeds, "tokens/s")
    if not title.startswith(KNOWN_TITLES):
        raise CoterieError(f"a record of {title!r} has no figure; known: {', '.join(KNOWN_TITLES)}")
    policies = [facts["policy"] for facts in record["facts"]["policies"]]
    samples_by_kernel = {
        (name.removeprefix(f"{policy} "), policy): values
        for name, values in samples.items()
        for policy in policies
        if name.startswith(f"{policy} ")
    }
    kernels = list(dict.fromkeys(kernel for kernel, _ in samples_by_kernel))
    medians = {
        kernel: statistics.median(
            statistics.median(samples_by_kernel[key])
            for key in samples_by_kernel
            if key[0] == kernel
        )
        for kernel in kernels
    }
    return Chart(sorted(kernels, key=lambda work: medians[work]), policies, samples_by_kernel, "ms")


def draw_chart(chart: Chart) -> Figure:
    """Medians, with a bar from quartile to quartile."""
    height = 1.3 + ROW_HEIGHT * len(chart.rows) * max(1, len(chart.series) / 2)
    figure, axis = new_axes(chart.unit, height=height)
    spacing = 0.5 / max(1, len(chart.series))
    for number, series in enumerate(chart.series):
        present_rows = [row for row in chart.rows if (row, series) in chart.samples]
        row_samples = [chart.samples[row, series] for row in present_rows]
        medians = [statistics.median(values) for values in row_samples]
        low, high = zip(*(_quartiles(values) for values in row_samples), strict=True)
        offset = (number - (len(chart.series) - 1) / 2) * spacing
        axis.errorbar(
            medians,
            [chart.rows.index(row) + offset for row in present_rows],
            xerr=[_error_bars(medians, low), _error_bars(high, medians)],
            fmt=MARKERS[number % len(MARKERS)],
            color=SERIES_COLOURS[number % len(SERIES_COLOURS)],
            elinewidth=1,
            label=series,
        )
    axis.set_yticks(range(len(chart.rows)), chart.rows)
    axis.set(ylim=(len(chart.rows) - 0.4, -0.6), xlim=(0, None))
    if len(chart.series) > 1:
        add_legend(axis)
    return figure


def _quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def _error_bars(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    return [max(0.0, a - b) for a, b in zip(upper, lower, strict=True)]
