"""Figures of what was timed, from its record alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.figures.style import PAPER, SERIES, axes, drawn, legend
from coterie.naming import CoterieError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*"
ROW = 0.27  # inches of height
KNOWN = ("bench layer", "bench forward", "generate")


@dataclass(frozen=True)
class Chart:
    """Samples by row and series; rows are read downwards."""

    rows: Sequence[str]
    series: Sequence[str]
    samples: Mapping[tuple[str, str], Sequence[float]]
    unit: str


def plot(path: Path) -> list[Path]:
    """Writes the figures of a record beside it, for light and for dark paper."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        chart = chart_of(record)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CoterieError(f"{path}: no record of a bench ({error})") from None
    made = []
    for scheme in PAPER:
        file = path.with_name(f"{path.stem}-{scheme}.svg")
        svg = drawn(lambda: draw(chart), name=path.stem, scheme=scheme)
        file.write_text(svg + "\n", encoding="utf-8")
        made.append(file)
    return made


def chart_of(record: Mapping[str, Any]) -> Chart:
    """What a record shows; raises CoterieError for one of another kind."""
    title = record["title"]
    samples = {measure["name"]: measure["samples"] for measure in record["measures"]}
    if title.startswith("generate"):
        rows = list(samples)
        speeds = {(row, "tokens/s"): samples[row] for row in rows}
        return Chart(rows, ["tokens/s"], speeds, "tokens/s")
    if not title.startswith(KNOWN):
        raise CoterieError(f"a record of {title!r} has no figure; known: {', '.join(KNOWN)}")
    policies = [each["policy"] for each in record["facts"]["policies"]]
    split = {
        (name.removeprefix(f"{policy} "), policy): taken
        for name, taken in samples.items()
        for policy in policies
        if name.startswith(f"{policy} ")
    }
    works = list(dict.fromkeys(work for work, _ in split))
    middle = {
        work: statistics.median(statistics.median(split[key]) for key in split if key[0] == work)
        for work in works
    }
    return Chart(sorted(works, key=lambda work: middle[work]), policies, split, "ms")


def draw(chart: Chart) -> Figure:
    """Medians, with a bar from quartile to quartile."""
    height = 1.3 + ROW * len(chart.rows) * max(1, len(chart.series) / 2)
    figure, plot = axes(chart.unit, height=height)
    shift = 0.5 / max(1, len(chart.series))
    for number, series in enumerate(chart.series):
        there = [row for row in chart.rows if (row, series) in chart.samples]
        taken = [chart.samples[row, series] for row in there]
        middle = [statistics.median(each) for each in taken]
        low, high = zip(*(_quartiles(each) for each in taken), strict=True)
        around = (number - (len(chart.series) - 1) / 2) * shift
        plot.errorbar(
            middle,
            [chart.rows.index(row) + around for row in there],
            xerr=[_gaps(middle, low), _gaps(high, middle)],
            fmt=MARKERS[number % len(MARKERS)],
            color=SERIES[number % len(SERIES)],
            elinewidth=1,
            label=series,
        )
    plot.set_yticks(range(len(chart.rows)), chart.rows)
    plot.set(ylim=(len(chart.rows) - 0.4, -0.6), xlim=(0, None))
    if len(chart.series) > 1:
        legend(plot)
    return figure


def _quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def _gaps(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [max(0.0, a - b) for a, b in zip(above, below, strict=True)]
