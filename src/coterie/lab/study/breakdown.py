"""Latency by part (Fig. 2, left): where a decoding forward spends its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypedDict, cast

from matplotlib.figure import Figure

from coterie.engine.engine import Engine
from coterie.engine.events import Denoised
from coterie.lab.bench.timing import (
    TimingConditions,
    TimingStats,
    describe_conditions,
    load_warnings,
    timing_conditions,
    timing_stats,
)
from coterie.lab.plotting import SERIES_COLOURS, new_axes
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.profiler import (
    ELECTION,
    EXPERTS,
    GATE,
    OTHER,
    PARTS,
    SHARED,
    Stopwatch,
    timed_model,
)

POLICIES = ("vanilla", "des-seq:k=3", "des-vote:beta=0.3")
ROUNDS = 5
NUM_PROMPTS = 8
MOE_PARTS = (EXPERTS, GATE, ELECTION, SHARED)  # what the paper calls the MoE layer


class PolicyBreakdown(TypedDict):
    """Decoding forwards of one row under one policy; ``shares`` are of all their time, and
    ``experts`` the unique experts of a layer."""

    policy: str
    forward: TimingStats
    parts: dict[str, TimingStats]
    shares: dict[str, float]
    experts: float


class BreakdownRecord(TypedDict):
    prompts: int
    rounds: int
    block: int
    machine: TimingConditions
    policies: list[PolicyBreakdown]


@dataclass(frozen=True)
class BreakdownExperiment:
    """One row at a time, prompts and policies taking turns, every part of the model timed."""

    name: str = "breakdown"
    title: str = "Where a decoding forward spends its time (Fig. 2, left)"
    question: str = (
        "One forward runs attention, a router, the experts and more. "
        "How large a part of its time are the experts, so how much can a coreset save?"
    )

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> ExperimentData:
        prompts = context.questions()[:NUM_PROMPTS]
        stopwatch = Stopwatch(context.engine.model.transformer.device)
        engine = Engine(
            timed_model(context.engine.model, stopwatch), generation=context.engine.generation
        )
        timings: dict[str, list[tuple[dict[str, float], float]]] = {p: [] for p in POLICIES}
        runs = [(prompt, policy) for prompt in prompts for policy in POLICIES]
        time_answer(engine, stopwatch, prompts[0], POLICIES[0])  # warms up
        for number in range(self.rounds):
            for index, (prompt, policy) in enumerate(runs):
                done = (number + index / len(runs)) / self.rounds
                context.on_progress(done, f"forwards under {policy}, part by part")
                timings[policy] += time_answer(engine, stopwatch, prompt, policy)
        record = BreakdownRecord(
            prompts=len(prompts),
            rounds=self.rounds,
            block=context.engine.generation.block,
            machine=timing_conditions(context.engine.model.transformer.device),
            policies=[
                summarize_breakdown(policy, forwards) for policy, forwards in timings.items()
            ],
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("BreakdownRecord", data)
        return [
            Drawing(
                self.name,
                f"A decoding forward's time by part; one row, blocks of {record['block']}, "
                f"{describe_conditions(record['machine'])}. The rest is the embedding, the head and "
                "the choice of words.",
                lambda: _draw(record),
            )
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("BreakdownRecord", data)
        policies = record["policies"]
        parts = [
            part
            for part in PARTS
            if any(part in policy_record["parts"] for policy_record in policies)
        ]
        rows = [
            [part, *(_format_cell(policy_record, part) for policy_record in policies)]
            for part in parts
        ]
        total_row = [
            "the whole forward",
            *(_format_ms(policy_record["forward"]) for policy_record in policies),
        ]
        forwards = ", ".join(f"{policy_record['forward']['samples']}" for policy_record in policies)
        return [
            Table(
                heads=["part", *(policy_record["policy"] for policy_record in policies)],
                rows=[*rows, total_row],
                caption="Median milliseconds of a decoding forward, and the share of all time. "
                f"{forwards} forwards; quartiles behind the median of the whole.",
                numbers=list(range(1, len(policies) + 1)),
            )
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("BreakdownRecord", data)
        vanilla = record["policies"][0]
        moe_share = sum(vanilla["shares"].get(part, 0.0) for part in MOE_PARTS)
        experts = vanilla["shares"].get(EXPERTS, 0.0)
        largest_part = max(vanilla["shares"], key=lambda part: vanilla["shares"][part])
        return [
            Finding(
                f"Under vanilla the MoE layers take {moe_share:.0%} of a forward, the experts "
                f"themselves {experts:.0%}; the largest part is {largest_part}. If experts cost nothing, a "
                f"forward would be {1 / (1 - experts):.1f} times as fast, and no more.",
                claim="The MoE layers take most of a decoding forward's time.",
                verdict="holds" if moe_share > 0.5 else "does not hold",
            ),
            *(_saving_finding(vanilla, other) for other in record["policies"][1:]),
            *load_warnings(record["machine"]),
        ]


def time_answer(
    engine: Engine, stopwatch: Stopwatch, prompt: str, policy: str
) -> list[tuple[dict[str, float], float]]:
    """Laps of every decoding forward of one answer, and the mean unique experts of its layers."""
    number, timings = engine.submit(prompt, policy=policy), []
    while number in engine.rows:
        stopwatch.laps = {}
        with stopwatch(OTHER):
            events = engine.step()
        for event in events:
            if isinstance(event, Denoised) and event.experts:
                timings.append((stopwatch.laps, fmean(event.experts)))
    return timings


def summarize_breakdown(
    policy: str, forwards: Sequence[tuple[dict[str, float], float]]
) -> PolicyBreakdown:
    """From the laps and the experts of every forward; a part that never ran is not there."""
    laps = [lap for lap, _ in forwards]
    wholes = [sum(lap.values()) for lap in laps]
    ran = [part for part in PARTS if any(part in lap for lap in laps)]
    parts = {part: [lap.get(part, 0.0) for lap in laps] for part in ran}
    return PolicyBreakdown(
        policy=policy,
        forward=timing_stats(wholes),
        parts={part: timing_stats(seconds) for part, seconds in parts.items()},
        shares={part: sum(seconds) / sum(wholes) for part, seconds in parts.items()},
        experts=fmean(used for _, used in forwards),
    )


def _draw(record: BreakdownRecord) -> Figure:
    policies = record["policies"]
    figure, ax = new_axes("milliseconds of the median forward", "", height=3.6)
    for index, entry in enumerate(policies):
        left, total = 0.0, entry["forward"]["median"]
        for part, color in zip(PARTS, SERIES_COLOURS, strict=True):
            share = entry["shares"].get(part, 0.0)
            width = share * total * 1e3
            if share:
                ax.barh(index, width, left=left, color=color, label=part, height=0.5)
            if share >= 0.08:
                middle = left + width / 2
                ax.text(middle, index, f"{share:.0%}", ha="center", va="center", color="white")
            left += width
        ax.text(0, index - 0.3, entry["policy"], va="bottom")
    ax.set(yticks=[], ylim=(len(policies) - 0.6, -0.75))
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    by_part = dict(zip(labels, handles, strict=True))
    figure.legend(by_part.values(), by_part.keys(), loc="outside lower left", ncols=3)
    return figure


def _saving_finding(vanilla: PolicyBreakdown, other: PolicyBreakdown) -> Finding:
    vanilla_experts, policy_experts = vanilla["parts"].get(EXPERTS), other["parts"].get(EXPERTS)
    saved = (
        vanilla_experts["median"] - policy_experts["median"]
        if vanilla_experts and policy_experts
        else 0.0
    )
    election = other["parts"][ELECTION]["median"] if ELECTION in other["parts"] else 0.0
    routing = other["parts"][GATE]["median"] - vanilla["parts"][GATE]["median"] + election
    ratio = vanilla["forward"]["median"] / other["forward"]["median"]
    return Finding(
        f"{other['policy']} uses {other['experts']:.0f} experts of a layer in place of "
        f"{vanilla['experts']:.0f}: a forward saves {saved * 1e3:.2f} ms in the experts and pays "
        f"{routing * 1e3:.2f} ms for election and constrained routing. It is {ratio:.2f} times as "
        "fast as vanilla.",
        claim="A coreset makes the forward faster.",
        verdict="holds"
        if other["forward"]["high"] < vanilla["forward"]["low"]
        else "does not hold",
    )


def _format_cell(entry: PolicyBreakdown, part: str) -> str:
    if part not in entry["parts"]:
        return ""
    return f"{entry['parts'][part]['median'] * 1e3:.2f} ({entry['shares'][part]:.0%})"


def _format_ms(timing: TimingStats) -> str:
    low, high = timing["low"] * 1e3, timing["high"] * 1e3
    return f"{timing['median'] * 1e3:.2f} [{low:.2f} to {high:.2f}]"
