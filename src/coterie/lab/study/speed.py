"""What a policy costs and saves end to end: forwards for each block, and tokens a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

from matplotlib.figure import Figure

from coterie.lab.plotting import add_legend, foreground, new_axes, policy_colour, policy_style
from coterie.lab.study.accuracy import DES_SEQ, DES_VOTE, GUARDED, RANDOM, TOP_K, smaller_counts
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import (
    ALL_BETAS,
    GUARD_OPTIONS,
    MAIN_BETAS,
    beta_variants,
    count_variants,
    run_comparison,
)

ROUNDS = 5
PAPER_LATENCY_CUT = 0.38  # the paper's: latency cut by up to so much


@dataclass(frozen=True)
class ForwardCountExperiment:
    """Runs shared with the accuracy chapters, looked at for their forwards."""

    name: str = "forwards"
    title: str = "Forwards for each block"
    question: str = (
        "Where sharing makes the model less sure, a block takes more forwards. How much of what a "
        "forward saves is spent again?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        k = context.engine.model.spec.router.k
        groups = {
            DES_VOTE: beta_variants("des-vote", ALL_BETAS),
            GUARDED: beta_variants("des-vote", MAIN_BETAS, GUARD_OPTIONS),
            DES_SEQ: count_variants("des-seq", smaller_counts(k)),
            TOP_K: count_variants("topk", smaller_counts(k)),
            RANDOM: beta_variants("random"),
        }
        return run_comparison(context, groups)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        results = VariantResults.from_data(data)
        return [
            Drawing(
                self.name,
                "Denoising forwards for each block against unique experts of a forward. On the "
                "broken line a policy reads as many experts for a block as vanilla does.",
                lambda: _draw(results),
            )
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        results = VariantResults.from_data(data)
        vanilla_per_block = _experts_per_block(results.vanilla)
        all_results = [
            results.vanilla,
            *(result for group in results.groups.values() for result in group),
        ]
        rows = [
            [
                result.name,
                f"{result.forwards_per_block:.2f}",
                f"{result.experts:.1f}",
                f"{_experts_per_block(result):.0f}",
                f"{_experts_per_block(result) / vanilla_per_block:.0%}",
                f"{result.accuracy:.1%}",
            ]
            for result in all_results
        ]
        heads = ["policy", "forwards", "experts", "experts a block", "of vanilla's", "right"]
        return [Table(heads, rows, "Experts a block: of all its forwards.", numbers=range(1, 6))]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        results = VariantResults.from_data(data)
        vanilla = results.vanilla
        votes = [t for t in results.groups[DES_VOTE] if t.experts < vanilla.experts]
        sentences = [
            f"{t.name} reads {1 - t.experts / vanilla.experts:.0%} fewer experts a forward than "
            f"vanilla and takes {t.forwards_per_block:.2f} forwards a block against "
            f"{vanilla.forwards_per_block:.2f}: for a whole block it reads "
            f"{_format_change(_experts_per_block(t) / _experts_per_block(vanilla))}."
            for t in (votes[1], votes[-2])
        ]
        slowest = max(results.groups[DES_VOTE], key=lambda t: t.forwards_per_block)
        return [
            Finding(
                " ".join(sentences),
                "Fewer experts a forward are fewer experts read (the paper counts forwards as "
                "given).",
                "holds"
                if _experts_per_block(slowest) < _experts_per_block(vanilla)
                else "does not hold",
            )
        ]


class PolicySpeed(TypedDict):
    """One policy: tokens a second of each round, and what was written and done in one."""

    policy: str
    rounds: list[float]
    tokens: int
    forwards: int
    experts: float


@dataclass(frozen=True)
class SpeedExperiment:
    """One row at a time, as somebody who waits for an answer has it; the policies in turns."""

    name: str = "speed"
    title: str = "Tokens a second, end to end"
    question: str = "Does a shared coreset make answers come faster on this machine?"

    def measure(self, context: StudyContext) -> ExperimentData:
        k = context.engine.model.spec.router.k
        policies = [
            "vanilla", f"topk:k={max(1, k // 2)}", f"des-seq:k={min(3, k)}", "des-vote:beta=0.5",
            "des-vote:beta=0.3", "des-vote:beta=0.15", f"des-vote:beta=0.3,{GUARD_OPTIONS}",
        ]  # fmt: skip
        prompts = context.questions()
        timed = {
            p: PolicySpeed(policy=p, rounds=[], tokens=0, forwards=0, experts=0) for p in policies
        }
        context.engine.generate(prompts[0])  # the first forwards of a process are slow
        for turn in range(ROUNDS):
            for index, policy in enumerate(policies):
                context.on_progress(
                    (turn + index / len(policies)) / ROUNDS, f"{policy}, round {turn + 1}"
                )
                start = time.perf_counter()
                results = [context.engine.generate(prompt, policy=policy) for prompt in prompts]
                seconds = time.perf_counter() - start
                entry = timed[policy]
                entry["tokens"] = sum(result.new_tokens for result in results)
                entry["forwards"] = sum(result.forwards for result in results)
                entry["experts"] = statistics.fmean(result.experts.mean for result in results)
                entry["rounds"].append(entry["tokens"] / seconds)
        return {"timed": list(timed.values()), "prompts": len(prompts)}

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        timed = cast("list[PolicySpeed]", data["timed"])
        caption = (
            "Tokens a second of one row at a time: the median of the rounds, with the least and "
            "the most."
        )
        return [Drawing(self.name, caption, lambda: _draw_bars(timed))]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        timed = cast("list[PolicySpeed]", data["timed"])
        base = statistics.median(timed[0]["rounds"])
        rows = [
            [
                entry["policy"],
                f"{statistics.median(entry['rounds']):.0f}",
                f"{min(entry['rounds']):.0f} to {max(entry['rounds']):.0f}",
                f"{statistics.median(entry['rounds']) / base:.2f}",
                f"{entry['experts']:.1f}",
                f"{entry['forwards']}",
            ]
            for entry in timed
        ]
        heads = ["policy", "tokens/s", "rounds", "of vanilla's", "experts", "forwards"]
        caption = f"{data['prompts']} questions, one at a time, {ROUNDS} rounds in turns."
        return [Table(heads, rows, caption, numbers=range(1, 6))]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        timed = cast("list[PolicySpeed]", data["timed"])
        base = statistics.median(timed[0]["rounds"])
        des = [entry for entry in timed if entry["policy"].startswith("des-")]
        best = max(des, key=lambda one: statistics.median(one["rounds"]))
        speed = statistics.median(best["rounds"])
        is_separated = min(best["rounds"]) > max(timed[0]["rounds"])
        saved = 1 - base / speed
        return [
            Finding(
                f"The fastest DES policy here is {best['policy']} with {speed:.0f} tokens a "
                f"second, vanilla writes {base:.0f} ({speed / base:.2f} times). On a model that "
                "lives in a processor's cache and is run by plain operations, reading fewer "
                "experts saves little, and the vote costs some.",
                f"DES cuts latency by up to {PAPER_LATENCY_CUT:.0%}.",
                "holds" if is_separated and saved >= PAPER_LATENCY_CUT else "does not hold",
            )
        ]


def _experts_per_block(result: VariantResult) -> float:
    return result.experts * result.forwards_per_block


def _format_change(ratio: float) -> str:
    return f"{1 - ratio:.0%} fewer" if ratio < 1 else f"{ratio - 1:.0%} more"


def _draw(results: VariantResults) -> Figure:
    figure, ax = new_axes(
        f"unique experts of {results.experts}, a layer and forward", "forwards a block"
    )
    vanilla_per_block = _experts_per_block(results.vanilla)
    max_forwards = max(t.forwards_per_block for group in results.groups.values() for t in group)
    xs = [vanilla_per_block / (1 + (max_forwards - 1) * step / 50) for step in range(51)]
    ax.plot(
        xs,
        [vanilla_per_block / x for x in xs],
        color=foreground(),
        lw=0.9,
        ls="--",
        label="as much read as by vanilla",
    )
    for label, variant_results in results.groups.items():
        style = policy_style(variant_results[-1].policy)
        ordered = sorted(variant_results, key=lambda tally: tally.experts)
        ax.plot(
            [t.experts for t in ordered], [t.forwards_per_block for t in ordered],
            color=style.colour, marker=style.marker, label=label,
        )  # fmt: skip
    vanilla = results.vanilla
    ax.plot([vanilla.experts], [vanilla.forwards_per_block], marker="*", ms=11, ls="",
             color=policy_colour("vanilla"), label="vanilla")  # fmt: skip
    ax.set(xlim=(0, None), ylim=(0, None))
    add_legend(ax, columns=2)
    return figure


def _draw_bars(timed: Sequence[PolicySpeed]) -> Figure:
    figure, ax = new_axes("tokens a second", height=0.42 * len(timed) + 0.9)
    positions = range(len(timed))
    medians = [statistics.median(t["rounds"]) for t in timed]
    low = [m - min(t["rounds"]) for m, t in zip(medians, timed, strict=True)]
    high = [max(t["rounds"]) - m for m, t in zip(medians, timed, strict=True)]
    colours = [policy_colour(t["policy"]) for t in timed]
    ax.barh(positions, medians, color=colours, height=0.65, xerr=[low, high], ecolor=foreground(),
             error_kw={"elinewidth": 0.9})  # fmt: skip
    labels = [t["policy"].replace(f",{GUARD_OPTIONS}", ", guarded") for t in timed]
    ax.set_yticks(list(positions), labels)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    return figure
