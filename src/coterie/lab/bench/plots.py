"""Figures of benchmark records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import ConfigError
from coterie.lab.bench.answers import setting_name
from coterie.lab.plotting import IntervalSeries, indexed_style, interval_chart, write_figure
from coterie.lab.timing import timing_stats
from coterie.strict_json import read_object

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KNOWN_TITLES = ("bench layer", "bench forward", "bench serve", "generate")


@dataclass(frozen=True)
class Chart:
    """Samples by series and row; rows are read from top to bottom."""

    rows: Sequence[str]
    samples: Mapping[str, Mapping[str, Sequence[float]]]
    unit: str


def plot_record(path: Path) -> list[Path]:
    """Writes a record's figures next to it, one per colour scheme."""
    record = read_object(path)
    try:
        chart = make_chart(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a benchmark record ({error})") from None
    return write_figure(partial(draw_chart, chart), path.with_suffix(""))


def make_chart(record: Mapping[str, Any]) -> Chart:
    """The chart of a record; raises ConfigError for a record of another kind."""
    title = record["title"]
    samples = {str(each["name"]): _finite(each["samples"]) for each in record["measures"]}
    if title.startswith("generate"):
        return Chart(list(samples), {"tokens/s": samples}, "tokens/s")
    if not title.startswith(KNOWN_TITLES):
        raise ConfigError(f"a record of {title!r} has no figure; known: {', '.join(KNOWN_TITLES)}")
    if title.startswith("bench serve"):
        return _rows_chart(record["facts"]["settings"], samples)
    by_policy: dict[str, dict[str, Sequence[float]]] = {}
    medians: dict[str, list[float]] = {}
    for policy in (facts["policy"] for facts in record["facts"]["policies"]):
        names = {name.removeprefix(f"{policy} "): name for name in samples}
        by_policy[policy] = {row: samples[name] for row, name in names.items() if row != name}
        for row, values in by_policy[policy].items():
            medians.setdefault(row, []).append(statistics.median(values))
    return Chart(sorted(medians, key=lambda row: statistics.median(medians[row])), by_policy, "ms")


def _rows_chart(
    settings: Sequence[Mapping[str, Any]], samples: Mapping[str, Sequence[float]]
) -> Chart:
    """Tokens per second by policy and number of rows."""
    by_policy: dict[str, dict[str, Sequence[float]]] = {}
    for facts in settings:
        name = setting_name(facts["policy"], facts["rows"])
        label = name.removeprefix(f"{facts['policy']} ")
        by_policy.setdefault(facts["policy"], {})[label] = samples[name]
    rows = dict.fromkeys(row for each in by_policy.values() for row in each)
    return Chart(list(rows), by_policy, "tokens/s")


def _finite(samples: Sequence[float]) -> Sequence[float]:
    """The samples; raises TypeError unless they are finite numbers, one at least."""
    if not samples or not all(isinstance(each, int | float) for each in samples):
        raise TypeError("samples are not numbers")
    if not all(map(isfinite, samples)):
        raise TypeError("samples are not finite")
    return samples


def draw_chart(chart: Chart) -> Figure:
    """Medians, with bars between the quartiles."""
    series = []
    for number, (label, samples) in enumerate(chart.samples.items()):
        stats = {row: timing_stats(values) for row, values in samples.items()}
        intervals = {
            row: (each["low"], each["median"], each["high"]) for row, each in stats.items()
        }
        series.append(IntervalSeries(label, indexed_style(number), intervals))
    return interval_chart(chart.rows, series, chart.unit)
