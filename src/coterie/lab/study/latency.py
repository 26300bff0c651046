"""Latency against experts (Fig. 2, right), and the fit of Equation 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from coterie.lab import timing
from coterie.lab.bench.routings import BLOCK_LENGTH, balanced_routing
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.plotting import SeriesStyle, indexed_style
from coterie.lab.study.charts import Series, line_chart, timing_series
from coterie.lab.study.experiment import Drawing, Entry, Experiment, Finding, StudyContext, Table
from coterie.lab.study.layers import (
    INPUTS_PER_WIDTH,
    BenchLayer,
    RunTimer,
    TimedRun,
    fit_points,
    layer_names,
    machine_values,
    measure_layers,
    rotate_inputs,
    routed_blocks,
)

TOKEN_COUNTS = (8, 16, 32, 64)
EXPERT_COUNTS = (8, 12, 19, 25, 38, 51, 64, 84, 112, 128, 163, 200, 256)  # unique experts timed
ROUNDS = {False: 40, True: 8}  # of the model's own small layers, of a large random layer
CHECKED_POLICIES = ("vanilla", "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
MIN_R2 = 0.95  # least R^2 at which Equation 2 holds


@dataclass(frozen=True)
class LatencyExperiment(Experiment, name="latency"):
    """Layers timed in turns over a grid of tokens and experts, and a plane fitted to the times.

    Each entry of ``lines`` in the record is a layer: ``bench``, ``points`` of the grid, their
    ``fit``, its bandwidth ``read`` (1/b in bytes per second; null where b is not positive), and
    ``checks``, blocks routed by a policy with the seconds that the fit ``predicted``.
    """

    shapes: Sequence[LayerShape] = PAPER_LAYERS
    pace: timing.TimingBudget = timing.FULL_BUDGET

    def measure(self, context: StudyContext) -> Entry:
        layers, machine = measure_layers(
            context, self.shapes, _measure_layer, budget=self.pace, rounds=ROUNDS
        )
        return {**machine, "lines": layers}

    def drawings(self, record: Entry) -> Sequence[Drawing]:
        layers = enumerate(map(_with_units, record["lines"]))
        return [
            Drawing(f"{self.name}-{n}", self.text.caption("figure", **layer), partial(_draw, layer))
            for n, layer in layers
        ]

    def tables(self, record: Entry) -> Sequence[Table]:
        layers = [_with_units(layer) for layer in record["lines"]]
        return [
            self.text.table("fit", layers, **machine_values(record)),
            *(self.text.table("checks", one["checks"], **one) for one in layers if one["checks"]),
        ]

    def findings(self, record: Entry) -> Sequence[Finding | str]:
        bandwidth = record["limits"]["bytes_per_second"]
        layers = [_with_units(layer) for layer in record["lines"]]
        return [
            *(self.text.finding("linear", layer["is_linear"], **layer) for layer in layers),
            *(self._reading_finding(layer, bandwidth) for layer in layers if layer["checks"]),
            *record["skipped"],
            *timing.load_warnings(record["machine"]),
        ]

    def _reading_finding(self, layer: Entry, bandwidth: float) -> Finding:
        vanilla = next(check for check in layer["checks"] if check["policy"] == CHECKED_POLICIES[0])
        share, rate = layer["fit"]["b"] * vanilla["used"] / vanilla["predicted"], ""
        if (read := layer["read"]) is not None:
            key = "rate_from_caches" if read > bandwidth else "rate"
            rate = self.text.sentence(key, share=read / bandwidth, **layer)
        values = {**layer, "vanilla": vanilla, "share": share, "rate": rate}
        return self.text.finding("reading", share >= 0.5, **values)


def _measure_layer(
    context: StudyContext, bench: BenchLayer, limits: timing.DeviceLimits, time_runs: RunTimer
) -> Entry:
    """Time a layer over a grid of tokens and experts, and fit Equation 2."""
    del limits
    draw, k = torch.Generator().manual_seed(0), bench.shape.router.k
    grid = {
        (tokens, used): _balanced_run(bench, tokens, used, draw)
        for tokens in TOKEN_COUNTS
        for used in sorted({k, *EXPERT_COUNTS, bench.shape.router.experts})
        if k <= used <= min(tokens * k, bench.shape.router.experts)
    }
    blocks = routed_blocks(context, bench, BLOCK_LENGTH, CHECKED_POLICIES)
    timed = time_runs({**grid, **blocks})
    points = [{"tokens": tokens, **timed[tokens, used]} for tokens, used in grid]
    fit = fit_points(points)
    predicted = {name: timing.predict_seconds(fit, b.used, b.pairs) for name, b in blocks.items()}
    checks = [{"policy": p, **timed[p], "predicted": seconds} for p, seconds in predicted.items()]
    read = bench.expert_bytes / fit["b"] if fit["b"] > 0 else None
    facts = {"bench": bench.to_record(), "points": points, "fit": fit}
    return {**facts, "read": read, "checks": checks}


def _balanced_run(bench: BenchLayer, tokens: int, used: int, draw: torch.Generator) -> TimedRun:
    """Tokens that use exactly ``used`` experts, each of them equally often."""
    routings = [
        balanced_routing(bench.shape.router, tokens, used, draw, bench.device)
        for _ in range(max(INPUTS_PER_WIDTH, len(bench.slabs)))
    ]
    run = rotate_inputs(bench, [bench.inputs(tokens, draw) for _ in routings], routings)
    return TimedRun(run, used, tokens * bench.shape.router.k)


def _with_units(layer: Entry) -> dict[str, Any]:
    """A layer of the record with its names, and its numbers in the units of the texts."""
    fit, read = layer["fit"], layer["read"]
    checks = [
        {
            **check,
            "ms": check["seconds"]["median"] * 1e3,
            "predicted_ms": check["predicted"] * 1e3,
            "error": check["predicted"] / check["seconds"]["median"] - 1,
        }
        for check in layer["checks"]
    ]
    is_linear = fit["r2"] >= MIN_R2 and fit["b"] > 0
    units = {"ms": fit["t0"] * 1e3, "us": {key: fit[key] * 1e6 for key in ("a", "b")}}
    rate = f"{read / 1e9:.1f}" if read else ""
    source = "of a skewed router" if layer["bench"]["random"] else "from real decoding"
    texts = {**layer_names(layer["bench"]), "gbps": rate, "source": source, "block": BLOCK_LENGTH}
    return {**layer, **units, **texts, "checks": checks, "is_linear": is_linear}


def _draw(layer: Entry) -> Figure:
    series = []
    for index, tokens in enumerate(TOKEN_COUNTS):
        points = [point for point in layer["points"] if point["tokens"] == tokens]
        if not points:
            continue
        style, used = indexed_style(index), [point["used"] for point in points]
        timings = [point["seconds"] for point in points]
        series.append(timing_series(style, used, timings, f"{tokens} tokens", ""))
        ends, pairs = (min(used), max(used)), points[0]["pairs"]
        fit_ms = [timing.predict_seconds(layer["fit"], end, pairs) * 1e3 for end in ends]
        series.append(Series(None, ends, fit_ms, replace(style, marker=""), width=1))
    if checks := layer["checks"]:
        x, y = ([check[key] for check in checks] for key in ("used", "ms"))
        style, label = SeriesStyle("", "x", ""), f"routed blocks of {BLOCK_LENGTH}"
        series.append(Series(label, x, y, style, line=""))
    slowest = max(point["seconds"]["median"] for point in layer["points"])
    x, limit = f"unique experts of {layer['bench']['experts']}", (0, 1.25e3 * slowest)
    return line_chart(series, x, "milliseconds", xlim=(0, None), ylim=limit, columns=3)
