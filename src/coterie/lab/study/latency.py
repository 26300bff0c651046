"""Latency against experts (Fig. 2, right), and the fit of Equation 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from coterie.lab.bench import timing
from coterie.lab.bench.routings import BLOCK_LENGTH, balanced_routing
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.plotting import SeriesStyle, foreground
from coterie.lab.study.charts import (
    Series,
    indexed_style,
    line_chart,
    milliseconds,
    timing_series,
)
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Entry,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    make_table,
)
from coterie.lab.study.layers import (
    INPUTS_PER_WIDTH,
    BenchLayer,
    RunTimer,
    TimedRun,
    fit_points,
    layer_description,
    layer_label,
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
class LatencyExperiment(Experiment):
    """Layers timed in turns over a grid of tokens and experts, and a plane fitted to the times.

    Each entry of ``lines`` in the record is a layer: ``bench``, ``points`` of the grid, their
    ``fit``, its bandwidth ``read`` (1/b in bytes per second; null where b is not positive), and
    ``checks``, blocks routed by a policy with the seconds that the fit ``predicted``.
    """

    text = ExperimentText.load("latency")

    shapes: Sequence[LayerShape] = PAPER_LAYERS
    pace: timing.TimingBudget = timing.FULL_BUDGET

    def measure(self, context: StudyContext) -> Mapping[str, object]:
        work = partial(_measure_layer, context)
        layers, machine = measure_layers(
            context, self.shapes, work, budget=self.pace, rounds=ROUNDS
        )
        return {**machine, "lines": layers}

    def drawings(self, record: Any) -> Sequence[Drawing]:
        return [
            Drawing(
                f"{self.name}-{number}",
                self.text.caption("figure", layer=layer_description(layer["bench"])),
                partial(_draw, layer),
            )
            for number, layer in enumerate(record["lines"])
        ]

    def tables(self, record: Any) -> Sequence[Table]:
        limits, machine = record["limits"], timing.describe_conditions(record["machine"])
        read = limits["bytes_per_second"] / 1e9
        fit_table = make_table(
            self.text.caption("fit", read=read, limits=limits, machine=machine),
            record["lines"],
            {
                "layer": lambda layer: layer_label(layer["bench"]),
                "experts": "{bench[experts]} x 3 x {bench[hidden]} x {bench[width]} {bench[dtype]}",
                "t0, ms": lambda layer: f"{layer['fit']['t0'] * 1e3:.3f}",
                "b, us": lambda layer: f"{layer['fit']['b'] * 1e6:.2f}",
                "a, us": lambda layer: f"{layer['fit']['a'] * 1e6:.3f}",
                "R2": "{fit[r2]:.4f}",
                "median error": "{fit[error]:.1%}",
                "GB/s by b": lambda layer: f"{layer['read'] / 1e9:.1f}" if layer["read"] else "",
            },
            text_columns=2,
        )
        return [
            fit_table,
            *(self._check_table(layer) for layer in record["lines"] if layer["checks"]),
        ]

    def findings(self, record: Any) -> Sequence[Finding | str]:
        layers, bandwidth = record["lines"], record["limits"]["bytes_per_second"]
        return [
            *(self._linearity_finding(layer) for layer in layers),
            *(self._reading_finding(layer, bandwidth) for layer in layers if layer["checks"]),
            *record["skipped"],
            *timing.load_warnings(record["machine"]),
        ]

    def _check_table(self, layer: Entry) -> Table:
        source = "of a skewed router" if layer["bench"]["random"] else "from real decoding"
        name = layer_description(layer["bench"])
        return make_table(
            self.text.caption("checks", block=BLOCK_LENGTH, source=source, layer=name),
            layer["checks"],
            {
                "policy": "{policy}",
                "unique experts": "{used:.1f}",
                "measured, ms": lambda check: milliseconds(check["seconds"]),
                "predicted, ms": lambda check: f"{check['predicted'] * 1e3:.2f}",
                "error": lambda c: f"{c['predicted'] / c['seconds']['median'] - 1:+.1%}",
            },
        )

    def _linearity_finding(self, layer: Entry) -> Finding:
        fit, name = layer["fit"], layer_description(layer["bench"])
        name = name[0].upper() + name[1:]
        us = {key: fit[key] * 1e6 for key in ("a", "b")}
        linear = fit["r2"] >= MIN_R2 and fit["b"] > 0
        return self.text.finding("linear", linear, layer=name, us=us, ms=fit["t0"] * 1e3, fit=fit)

    def _reading_finding(self, layer: Entry, bandwidth: float) -> Finding:
        vanilla = next(check for check in layer["checks"] if check["policy"] == CHECKED_POLICIES[0])
        share, read, rate = (
            layer["fit"]["b"] * vanilla["used"] / vanilla["predicted"],
            layer["read"],
            "",
        )
        if read is not None:
            key = "rate_from_caches" if read > bandwidth else "rate"
            rate = self.text.sentence(key, read=read / 1e9, share=read / bandwidth)
        name = layer_description(layer["bench"])
        return self.text.finding(
            "reading",
            share >= 0.5,
            block=BLOCK_LENGTH,
            layer=name,
            vanilla=vanilla,
            share=share,
            rate=rate,
        )


def _measure_layer(
    context: StudyContext, bench: BenchLayer, limits: timing.DeviceLimits, time_runs: RunTimer
) -> Entry:
    """Time a layer over a grid of tokens and experts, and fit Equation 2."""
    del limits
    draw, k = torch.Generator().manual_seed(0), bench.router.k
    grid = {
        (tokens, used): _balanced_run(bench, tokens, used, draw)
        for tokens in TOKEN_COUNTS
        for used in sorted({k, *EXPERT_COUNTS, bench.router.experts})
        if k <= used <= min(tokens * k, bench.router.experts)
    }
    blocks = routed_blocks(context, bench, BLOCK_LENGTH, CHECKED_POLICIES)
    timed = time_runs({**grid, **blocks})
    points = [{"tokens": tokens, **timed[tokens, used]} for tokens, used in grid]
    fit = fit_points(points)
    checks = [
        {
            "policy": policy,
            **timed[policy],
            "predicted": timing.predict_seconds(fit, block.used, block.pairs),
        }
        for policy, block in blocks.items()
    ]
    read = bench.expert_bytes / fit["b"] if fit["b"] > 0 else None
    return {"bench": bench.to_info(), "points": points, "fit": fit, "read": read, "checks": checks}


def _balanced_run(bench: BenchLayer, tokens: int, used: int, draw: torch.Generator) -> TimedRun:
    """Tokens that use exactly ``used`` experts, each of them equally often."""
    routings = [
        balanced_routing(bench.router, tokens, used, draw, bench.device)
        for _ in range(max(INPUTS_PER_WIDTH, len(bench.slabs)))
    ]
    run = rotate_inputs(bench, [bench.inputs(tokens, draw) for _ in routings], routings)
    return TimedRun(run, used, tokens * bench.router.k)


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
        x, y = [c["used"] for c in checks], [c["seconds"]["median"] * 1e3 for c in checks]
        style, label = SeriesStyle(foreground(), "x", ""), f"routed blocks of {BLOCK_LENGTH}"
        series.append(Series(label, x, y, style, line=""))
    slowest = max(point["seconds"]["median"] for point in layer["points"])
    x, limit = f"unique experts of {layer['bench']['experts']}", (0, 1.25e3 * slowest)
    return line_chart(series, x, "milliseconds", xlim=(0, None), ylim=limit, columns=3)
