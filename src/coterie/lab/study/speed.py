"""End-to-end cost of a policy: forwards per block, and tokens per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TypedDict

from matplotlib.figure import Figure

from coterie.lab.plotting import (
    add_legend,
    foreground,
    new_axes,
    policy_colour,
    policy_style,
)
from coterie.lab.study.accuracy import DES_SEQ, DES_VOTE, GUARDED, RANDOM, TOP_K, smaller_counts
from coterie.lab.study.charts import Series, draw_guide, draw_series
from coterie.lab.study.comparison import unique_experts_label, vanilla_series
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
from coterie.lab.study.results import VariantResults, VariantsRecord
from coterie.lab.study.variants import (
    ALL_BETAS,
    GUARD_OPTIONS,
    MAIN_BETAS,
    beta_variants,
    count_variants,
    run_comparison,
)

ROUNDS = 5
PAPER_LATENCY_CUT = 0.38  # the paper: latency falls by up to this share


class ForwardCountExperiment(Experiment):
    """The runs are shared with the accuracy experiments; this one reads their forwards."""

    text = ExperimentText.load("forwards")

    def measure(self, context: StudyContext) -> VariantsRecord:
        k = context.engine.model.spec.router.k
        groups = {
            DES_VOTE: beta_variants("des-vote", ALL_BETAS),
            GUARDED: beta_variants("des-vote", MAIN_BETAS, GUARD_OPTIONS),
            DES_SEQ: count_variants("des-seq", smaller_counts(k)),
            TOP_K: count_variants("topk", smaller_counts(k)),
            RANDOM: beta_variants("random"),
        }
        return run_comparison(context, groups)

    def drawings(self, record: VariantsRecord) -> Sequence[Drawing]:
        results = VariantResults.from_record(record)
        caption = (
            "Denoising forwards per block against unique experts per forward. On the dashed line a "
            "policy reads as many experts per block as vanilla does."
        )
        return [Drawing(self.name, caption, lambda: _draw_forwards(results))]

    def tables(self, record: VariantsRecord) -> Sequence[Table]:
        results = VariantResults.from_record(record)
        per_block = results.vanilla.experts_per_block
        return [
            make_table(
                "Experts per block: over all its forwards.",
                results.all,
                {
                    "policy": "{0.name}",
                    "forwards": "{0.forwards_per_block:.2f}",
                    "experts": "{0.experts:.1f}",
                    "experts per block": "{0.experts_per_block:.0f}",
                    "of vanilla's": lambda r: f"{r.experts_per_block / per_block:.0%}",
                    "accuracy": "{0.accuracy:.1%}",
                },
            )
        ]

    def findings(self, record: VariantsRecord) -> Sequence[Finding | str]:
        results = VariantResults.from_record(record)
        vanilla, group = results.vanilla, results.groups[DES_VOTE]
        votes = [result for result in group if result.experts < vanilla.experts]
        sentences = []
        for result in (votes[1], votes[-2]):
            ratio = result.experts_per_block / vanilla.experts_per_block
            change = f"{1 - ratio:.0%} fewer" if ratio < 1 else f"{ratio - 1:.0%} more"
            sentences.append(
                f"{result.name} reads {1 - result.experts / vanilla.experts:.0%} fewer experts per "
                f"forward than vanilla and needs {result.forwards_per_block:.2f} forwards per "
                f"block against {vanilla.forwards_per_block:.2f}: per block it reads {change}."
            )
        slowest = max(group, key=lambda result: result.forwards_per_block)
        return [
            judge(
                " ".join(sentences),
                "Fewer experts per forward mean fewer experts read per block (the paper takes the "
                "number of forwards as given).",
                slowest.experts_per_block < vanilla.experts_per_block,
            )
        ]


class PolicySpeed(TypedDict):
    """Tokens per second of each round; tokens, forwards and experts of one round."""

    policy: str
    rounds: list[float]
    tokens: int
    forwards: int
    experts: float


class SpeedRecord(TypedDict):
    timed: list[PolicySpeed]
    prompts: int


class SpeedExperiment(Experiment):
    """One row at a time, as in interactive use; the policies take turns."""

    text = ExperimentText.load("speed")

    def measure(self, context: StudyContext) -> SpeedRecord:
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
                share = (turn + index / len(policies)) / ROUNDS
                context.on_progress(share, f"{policy}, round {turn + 1}")
                start = time.perf_counter()
                results = [context.engine.generate(prompt, policy=policy) for prompt in prompts]
                seconds = time.perf_counter() - start
                entry = timed[policy]
                entry["tokens"] = sum(result.new_tokens for result in results)
                entry["forwards"] = sum(result.forwards for result in results)
                entry["experts"] = statistics.fmean(result.experts.mean for result in results)
                entry["rounds"].append(entry["tokens"] / seconds)
        return SpeedRecord(timed=list(timed.values()), prompts=len(prompts))

    def drawings(self, record: SpeedRecord) -> Sequence[Drawing]:
        caption = (
            "Tokens per second of one row at a time: median, minimum and maximum of the rounds."
        )
        return [Drawing(self.name, caption, lambda: _draw_bars(record["timed"]))]

    def tables(self, record: SpeedRecord) -> Sequence[Table]:
        base = _median_speed(record["timed"][0])
        return [
            make_table(
                f"{record['prompts']} problems, one at a time; {ROUNDS} rounds, policies in turns.",
                record["timed"],
                {
                    "policy": "{policy}",
                    "tokens/s": lambda entry: f"{_median_speed(entry):.0f}",
                    "rounds": lambda e: f"{min(e['rounds']):.0f} to {max(e['rounds']):.0f}",
                    "of vanilla's": lambda entry: f"{_median_speed(entry) / base:.2f}",
                    "experts": "{experts:.1f}",
                    "forwards": "{forwards}",
                },
            )
        ]

    def findings(self, record: SpeedRecord) -> Sequence[Finding | str]:
        vanilla, *others = record["timed"]
        des = [entry for entry in others if entry["policy"].startswith("des-")]
        best = max(des, key=_median_speed)
        base, speed = _median_speed(vanilla), _median_speed(best)
        is_separated = min(best["rounds"]) > max(vanilla["rounds"])
        return [
            judge(
                f"The fastest DES policy is {best['policy']} with {speed:.0f} tokens per second; "
                f"vanilla generates {base:.0f} ({speed / base:.2f} times). This model fits in a "
                "processor's cache and runs on plain operations, so reading fewer experts saves "
                "little and the vote has a cost.",
                f"DES reduces latency by up to {PAPER_LATENCY_CUT:.0%}.",
                is_separated and 1 - base / speed >= PAPER_LATENCY_CUT,
            )
        ]


def _median_speed(entry: PolicySpeed) -> float:
    return statistics.median(entry["rounds"])


def _draw_forwards(results: VariantResults) -> Figure:
    figure, ax = new_axes(unique_experts_label(results), "forwards per block")
    vanilla = results.vanilla
    most = max(result.forwards_per_block for result in results.all[1:])
    xs = [vanilla.experts_per_block / (1 + (most - 1) * step / 50) for step in range(51)]
    draw_guide(ax, xs, [vanilla.experts_per_block / x for x in xs], "reads as much as vanilla")
    for label, group in results.groups.items():
        ordered = sorted(group, key=lambda result: result.experts)
        x, y = [r.experts for r in ordered], [r.forwards_per_block for r in ordered]
        draw_series(ax, Series(label, x, y, policy_style(group[-1].policy)))
    draw_series(ax, vanilla_series(vanilla, vanilla.forwards_per_block))
    ax.set(xlim=(0, None), ylim=(0, None))
    add_legend(ax, columns=2)
    return figure


def _draw_bars(timed: Sequence[PolicySpeed]) -> Figure:
    figure, ax = new_axes("tokens per second", height=0.42 * len(timed) + 0.9)
    medians = [_median_speed(entry) for entry in timed]
    low = [m - min(entry["rounds"]) for m, entry in zip(medians, timed, strict=True)]
    high = [max(entry["rounds"]) - m for m, entry in zip(medians, timed, strict=True)]
    colours = [policy_colour(entry["policy"]) for entry in timed]
    ax.barh(range(len(timed)), medians, color=colours, height=0.65, xerr=[low, high],
            ecolor=foreground(), error_kw={"elinewidth": 0.9})  # fmt: skip
    labels = [entry["policy"].replace(f",{GUARD_OPTIONS}", ", guarded") for entry in timed]
    ax.set_yticks(range(len(timed)), labels)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    return figure
