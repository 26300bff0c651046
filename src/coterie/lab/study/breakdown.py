"""Latency by part (Fig. 2, left): the time of each part of a decoding forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from coterie.engine.engine import Engine
from coterie.engine.events import Denoised
from coterie.lab import timing
from coterie.lab.bench.profiler import (
    ELECTION,
    EXPERTS,
    GATE,
    OTHER,
    PARTS,
    SHARED,
    Stopwatch,
    timed_model,
)
from coterie.lab.plotting import SERIES_COLOURS, new_axes
from coterie.lab.study.experiment import Entry, Experiment, Finding, Part, StudyContext

POLICIES = ("vanilla", "des-seq:k=3", "des-vote:beta=0.3")
ROUNDS = 5
NUM_PROMPTS = 8
MOE_PARTS = (EXPERTS, GATE, ELECTION, SHARED)  # the MoE layer in the paper's sense
WHOLE = "the whole forward"
Laps = tuple[dict[str, float], float]  # seconds by part, and unique experts of a layer


@dataclass(frozen=True)
class BreakdownExperiment(Experiment, name="breakdown"):
    """One row at a time; prompts and policies take turns, and every part of the model is timed."""

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> Entry:
        model, generation = context.engine.model, context.engine.generation
        prompts = context.questions()[:NUM_PROMPTS]
        stopwatch = Stopwatch(model.transformer.device)
        engine = Engine(timed_model(model, stopwatch), generation=generation)
        laps: dict[str, list[Laps]] = {policy: [] for policy in POLICIES}
        time_answer(engine, stopwatch, prompts[0], POLICIES[0])  # warms up
        runs = list(product(range(self.rounds), prompts, POLICIES))
        for number, (_, prompt, policy) in enumerate(runs):
            context.on_progress(number / len(runs), f"forwards under {policy}, by part")
            laps[policy] += time_answer(engine, stopwatch, prompt, policy)
        return {
            "prompts": len(prompts),
            "rounds": self.rounds,
            "block": generation.block,
            "machine": timing.timing_conditions(model.transformer.device),
            "policies": [summarize_breakdown(policy, runs) for policy, runs in laps.items()],
        }

    def report(self, record: Entry) -> Iterator[Part]:
        conditions = timing.describe_conditions(record["machine"])
        draw = partial(_draw, record["policies"])
        yield self.text.drawing("figure", draw, record=record, conditions=conditions)
        entries = {entry["policy"]: entry for entry in record["policies"]}
        parts = [part for part in PARTS if any(part in e["parts"] for e in entries.values())]
        forwards = ", ".join(str(entry["forward"]["samples"]) for entry in entries.values())
        columns = {name: partial(_cell, entry) for name, entry in entries.items()}
        yield self.text.table("parts", [*parts, WHOLE], columns, forwards=forwards)
        vanilla, *others = record["policies"]
        shares = vanilla["shares"]
        moe_share = sum(shares.get(part, 0.0) for part in MOE_PARTS)
        experts = shares.get(EXPERTS, 0.0)
        yield self.text.finding(
            "moe",
            moe_share > 0.5,
            moe_share=moe_share,
            experts=experts,
            largest=max(shares, key=lambda part: shares[part]),
            limit=1 / (1 - experts),
        )
        yield from (self._saving_finding(vanilla, other) for other in others)
        yield from timing.load_warnings(record["machine"])

    def _saving_finding(self, vanilla: Entry, other: Entry) -> Finding:
        def median(entry: Entry, part: str) -> float:
            return entry["parts"][part]["median"] if part in entry["parts"] else 0.0

        before, after = vanilla["forward"], other["forward"]
        routing = median(other, GATE) - median(vanilla, GATE) + median(other, ELECTION)
        return self.text.finding(
            "saving",
            after["high"] < before["low"],
            other=other,
            vanilla=vanilla,
            saved=1e3 * (median(vanilla, EXPERTS) - median(other, EXPERTS)),
            routing=1e3 * routing,
            ratio=before["median"] / after["median"],
        )


def time_answer(engine: Engine, stopwatch: Stopwatch, prompt: str, policy: str) -> list[Laps]:
    """Times of every decoding forward of one answer, and the mean unique experts of its layers."""
    row, timings = engine.submit(prompt, policy=policy), []
    while row in engine.rows:
        stopwatch.laps = {}
        with stopwatch(OTHER):
            events = engine.step()
        for event in events:
            if isinstance(event, Denoised) and event.experts:
                timings.append((stopwatch.laps, fmean(event.experts)))
    return timings


def summarize_breakdown(policy: str, forwards: Sequence[Laps]) -> Entry:
    """Statistics over the forwards; ``shares`` are of their total time.

    A part that never ran is missing.
    """
    laps = [lap for lap, _ in forwards]
    wholes = [sum(lap.values()) for lap in laps]
    ran = [part for part in PARTS if any(part in lap for lap in laps)]
    parts = {part: [lap.get(part, 0.0) for lap in laps] for part in ran}
    return {
        "policy": policy,
        "forward": timing.timing_stats(wholes),
        "parts": {part: timing.timing_stats(seconds) for part, seconds in parts.items()},
        "shares": {part: sum(seconds) / sum(wholes) for part, seconds in parts.items()},
        "experts": fmean(used for _, used in forwards),
    }


def _cell(entry: Entry, part: str) -> str:
    timing = entry["forward"] if part == WHOLE else entry["parts"].get(part)
    if timing is None:
        return ""
    median, low, high = (1e3 * timing[key] for key in ("median", "low", "high"))
    if part == WHOLE:
        return f"{median:.2f} [{low:.2f} to {high:.2f}]"
    return f"{median:.2f} ({entry['shares'][part]:.0%})"


def _draw(policies: Sequence[Entry]) -> Figure:
    """A stacked bar per policy."""
    figure, ax = new_axes("milliseconds of the median forward", height=3.6)
    names = [entry["policy"] for entry in policies]
    medians = np.array([1e3 * entry["forward"]["median"] for entry in policies])
    left = np.zeros(len(policies))
    for part, colour in zip(PARTS, SERIES_COLOURS, strict=True):
        shares = np.array([entry["shares"].get(part, 0.0) for entry in policies])
        bars = ax.barh(names, shares * medians, left=left, color=colour, label=part, height=0.5)
        labels = [f"{share:.0%}" if share >= 0.08 else "" for share in shares]
        ax.bar_label(bars, labels, label_type="center", color="white")
        left += shares * medians
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=3)
    return figure
