"""Latency by part (Fig. 2, left): the time of each part of a decoding forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypedDict

from matplotlib.figure import Figure

from coterie.engine.engine import Engine
from coterie.engine.events import Denoised
from coterie.lab.bench import timing
from coterie.lab.plotting import SERIES_COLOURS, new_axes
from coterie.lab.study.charts import milliseconds, quartiles_text
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    judge,
    make_table,
)
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
MOE_PARTS = (EXPERTS, GATE, ELECTION, SHARED)  # the MoE layer in the paper's sense
WHOLE = "the whole forward"
Laps = tuple[dict[str, float], float]  # seconds by part, and unique experts of a layer


class PolicyBreakdown(TypedDict):
    """Decoding forwards of one row under one policy; ``shares`` are of their total time.

    ``experts`` are unique experts of a layer.
    """

    policy: str
    forward: timing.TimingStats
    parts: dict[str, timing.TimingStats]
    shares: dict[str, float]
    experts: float


class BreakdownRecord(TypedDict):
    prompts: int
    rounds: int
    block: int
    machine: timing.TimingConditions
    policies: list[PolicyBreakdown]


@dataclass(frozen=True)
class BreakdownExperiment(Experiment):
    """One row at a time; prompts and policies take turns, and every part of the model is timed."""

    text = ExperimentText.load("breakdown")

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> BreakdownRecord:
        model, generation = context.engine.model, context.engine.generation
        prompts = context.questions()[:NUM_PROMPTS]
        stopwatch = Stopwatch(model.transformer.device)
        engine = Engine(timed_model(model, stopwatch), generation=generation)
        timings: dict[str, list[Laps]] = {policy: [] for policy in POLICIES}
        runs = [(prompt, policy) for prompt in prompts for policy in POLICIES]
        time_answer(engine, stopwatch, prompts[0], POLICIES[0])  # warms up
        for number in range(self.rounds):
            for index, (prompt, policy) in enumerate(runs):
                done = (number + index / len(runs)) / self.rounds
                context.on_progress(done, f"forwards under {policy}, by part")
                timings[policy] += time_answer(engine, stopwatch, prompt, policy)
        return BreakdownRecord(
            prompts=len(prompts),
            rounds=self.rounds,
            block=generation.block,
            machine=timing.timing_conditions(model.transformer.device),
            policies=[summarize_breakdown(policy, laps) for policy, laps in timings.items()],
        )

    def drawings(self, record: BreakdownRecord) -> Sequence[Drawing]:
        caption = (
            f"Time of a decoding forward by part; one row, blocks of {record['block']}, "
            f"{timing.describe_conditions(record['machine'])}. The rest is the embedding, "
            "the head and sampling."
        )
        return [Drawing(self.name, caption, lambda: _draw(record["policies"]))]

    def tables(self, record: BreakdownRecord) -> Sequence[Table]:
        policies = record["policies"]

        def cell(entry: PolicyBreakdown) -> Callable[[str], str]:
            def text(part: str) -> str:
                if part == WHOLE:
                    forward = entry["forward"]
                    return f"{milliseconds(forward)} [{quartiles_text(forward)}]"
                if part not in entry["parts"]:
                    return ""
                return f"{milliseconds(entry['parts'][part])} ({entry['shares'][part]:.0%})"

            return text

        parts = [part for part in PARTS if any(part in entry["parts"] for entry in policies)]
        forwards = ", ".join(f"{entry['forward']['samples']}" for entry in policies)
        caption = (
            "Median milliseconds of a decoding forward, and the share of the total time. "
            f"{forwards} forwards; the whole forward with quartiles."
        )
        columns = {entry["policy"]: cell(entry) for entry in policies}
        return [make_table(caption, [*parts, WHOLE], {"part": "{0}", **columns})]

    def findings(self, record: BreakdownRecord) -> Sequence[Finding | str]:
        vanilla, *others = record["policies"]
        shares = vanilla["shares"]
        moe_share = sum(shares.get(part, 0.0) for part in MOE_PARTS)
        experts = shares.get(EXPERTS, 0.0)
        largest_part = max(shares, key=lambda part: shares[part])
        return [
            judge(
                f"Under vanilla the MoE layers take {moe_share:.0%} of a forward, the experts "
                f"themselves {experts:.0%}; the largest part is {largest_part}. If experts cost "
                f"nothing, a forward would be {1 / (1 - experts):.1f} times as fast.",
                "The MoE layers take most of a decoding forward's time.",
                moe_share > 0.5,
            ),
            *(_saving_finding(vanilla, other) for other in others),
            *timing.load_warnings(record["machine"]),
        ]


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


def summarize_breakdown(policy: str, forwards: Sequence[Laps]) -> PolicyBreakdown:
    """Statistics over the forwards; a part that never ran is missing."""
    laps = [lap for lap, _ in forwards]
    wholes = [sum(lap.values()) for lap in laps]
    ran = [part for part in PARTS if any(part in lap for lap in laps)]
    parts = {part: [lap.get(part, 0.0) for lap in laps] for part in ran}
    return PolicyBreakdown(
        policy=policy,
        forward=timing.timing_stats(wholes),
        parts={part: timing.timing_stats(seconds) for part, seconds in parts.items()},
        shares={part: sum(seconds) / sum(wholes) for part, seconds in parts.items()},
        experts=fmean(used for _, used in forwards),
    )


def _draw(policies: Sequence[PolicyBreakdown]) -> Figure:
    figure, ax = new_axes("milliseconds of the median forward", "", height=3.6)
    for index, entry in enumerate(policies):
        left, total = 0.0, entry["forward"]["median"]
        for part, colour in zip(PARTS, SERIES_COLOURS, strict=True):
            share = entry["shares"].get(part, 0.0)
            width = share * total * 1e3
            if share:
                ax.barh(index, width, left=left, color=colour, label=part, height=0.5)
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
    def median(entry: PolicyBreakdown, part: str) -> float:
        return entry["parts"][part]["median"] if part in entry["parts"] else 0.0

    both = all(EXPERTS in entry["parts"] for entry in (vanilla, other))
    saved = median(vanilla, EXPERTS) - median(other, EXPERTS) if both else 0.0
    routing = median(other, GATE) - median(vanilla, GATE) + median(other, ELECTION)
    ratio = vanilla["forward"]["median"] / other["forward"]["median"]
    return judge(
        f"{other['policy']} uses {other['experts']:.0f} experts of a layer instead of "
        f"{vanilla['experts']:.0f}. A forward saves {saved * 1e3:.2f} ms in the experts, and "
        f"election and constrained routing cost {routing * 1e3:.2f} ms. It is {ratio:.2f} times as "
        "fast as vanilla.",
        "A coreset makes the forward faster.",
        other["forward"]["high"] < vanilla["forward"]["low"],
    )
