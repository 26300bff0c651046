"""Figures of benchmark records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import ConfigError
from coterie.lab.plotting import IntervalSeries, indexed_style, interval_chart, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KNOWN_TITLES = ("bench layer", "bench forward", "generate")


@dataclass(frozen=True)
class Chart:
    """Samples by row and series; rows are read from top to bottom."""

    rows: Sequence[str]
    series: Sequence[str]
    samples: Mapping[tuple[str, str], Sequence[float]]
    unit: str


def plot_record(path: Path) -> list[Path]:
    """Writes a record's figures next to it, one per colour scheme."""
    try:
        chart = make_chart(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a benchmark record ({error})") from None
    return write_figure(partial(draw_chart, chart), path.with_suffix(""))


def make_chart(record: Mapping[str, Any]) -> Chart:
    """The chart of a record; raises ConfigError for a record of another kind."""
    title = record["title"]
    samples = {entry["name"]: entry["samples"] for entry in record["measures"]}
    if title.startswith("generate"):
        speeds = {(policy, "tokens/s"): samples[policy] for policy in samples}
        return Chart(list(samples), ["tokens/s"], speeds, "tokens/s")
    if not title.startswith(KNOWN_TITLES):
        raise ConfigError(f"a record of {title!r} has no figure; known: {', '.join(KNOWN_TITLES)}")
    policies = [facts["policy"] for facts in record["facts"]["policies"]]
    medians: dict[str, list[float]] = {}
    samples_by_kernel = {}
    for name, values in samples.items():
        for policy in policies:
            if name.startswith(f"{policy} "):
                kernel = name.removeprefix(f"{policy} ")
                samples_by_kernel[kernel, policy] = values
                medians.setdefault(kernel, []).append(statistics.median(values))
    kernels = sorted(medians, key=lambda kernel: statistics.median(medians[kernel]))
    return Chart(kernels, policies, samples_by_kernel, "ms")


def draw_chart(chart: Chart) -> Figure:
    """Medians, with bars between the quartiles."""
    intervals: dict[str, dict[str, tuple[float, float, float]]] = {}
    for (row, label), samples in chart.samples.items():
        intervals.setdefault(label, {})[row] = _quartiles(samples)
    series = [
        IntervalSeries(label, indexed_style(number), intervals[label])
        for number, label in enumerate(chart.series)
    ]
    return interval_chart(chart.rows, series, chart.unit)


def _quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, statistics.median(samples), high
