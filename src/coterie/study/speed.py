"""What a policy costs and saves end to end: forwards for each block, and tokens a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

from matplotlib.figure import Figure

from coterie.figures.style import axes, colour, ink, legend, look
from coterie.study.accuracy import GUARDED, LOT, SEQ, TOP, VOTE, fewer
from coterie.study.arms import BETAS, FEW, GUARD, by_beta, by_count, compare
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.lab import Lab
from coterie.study.tally import Arms, Tally

ROUNDS = 5
HEADLINE = 0.38  # the paper's: latency cut by up to so much


@dataclass(frozen=True)
class Forwards:
    """Runs shared with the accuracy chapters, looked at for their forwards."""

    name: str = "forwards"
    title: str = "Forwards for each block"
    question: str = (
        "Where sharing makes the model less sure, a block takes more forwards. How much of what a "
        "forward saves is spent again?"
    )

    def measure(self, lab: Lab) -> Facts:
        k = lab.engine.model.spec.router.k
        groups = {
            VOTE: by_beta("des-vote", BETAS),
            GUARDED: by_beta("des-vote", FEW, GUARD),
            SEQ: by_count("des-seq", fewer(k)),
            TOP: by_count("topk", fewer(k)),
            LOT: by_beta("random"),
        }
        return compare(lab, groups)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        arms = Arms.of(facts)
        return [
            Drawing(
                self.name,
                "Denoising forwards for each block against unique experts of a forward. On the "
                "broken line a policy reads as many experts for a block as vanilla does.",
                lambda: _draw(arms),
            )
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        arms = Arms.of(facts)
        whole = _per_block(arms.vanilla)
        every = [arms.vanilla, *(tally for group in arms.groups.values() for tally in group)]
        rows = [
            [
                tally.name,
                f"{tally.forwards_per_block:.2f}",
                f"{tally.experts:.1f}",
                f"{_per_block(tally):.0f}",
                f"{_per_block(tally) / whole:.0%}",
                f"{tally.accuracy:.1%}",
            ]
            for tally in every
        ]
        heads = ["policy", "forwards", "experts", "experts a block", "of vanilla's", "right"]
        return [Table(heads, rows, "Experts a block: of all its forwards.", numbers=range(1, 6))]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        arms = Arms.of(facts)
        whole = arms.vanilla
        votes = [t for t in arms.groups[VOTE] if t.experts < whole.experts]
        told = [
            f"{t.name} reads {1 - t.experts / whole.experts:.0%} fewer experts a forward than "
            f"vanilla and takes {t.forwards_per_block:.2f} forwards a block against "
            f"{whole.forwards_per_block:.2f}: for a whole block it reads "
            f"{_less(_per_block(t) / _per_block(whole))}."
            for t in (votes[1], votes[-2])
        ]
        most = max(arms.groups[VOTE], key=lambda t: t.forwards_per_block)
        return [
            Finding(
                " ".join(told),
                "Fewer experts a forward are fewer experts read (the paper counts forwards as "
                "given).",
                "holds" if _per_block(most) < _per_block(whole) else "does not hold",
            )
        ]


class Timed(TypedDict):
    """One policy: tokens a second of each round, and what was written and done in one."""

    policy: str
    rounds: list[float]
    tokens: int
    forwards: int
    experts: float


@dataclass(frozen=True)
class Speed:
    """One row at a time, as somebody who waits for an answer has it; the policies in turns."""

    name: str = "speed"
    title: str = "Tokens a second, end to end"
    question: str = "Does a shared coreset make answers come faster on this machine?"

    def measure(self, lab: Lab) -> Facts:
        k = lab.engine.model.spec.router.k
        policies = [
            "vanilla", f"topk:k={max(1, k // 2)}", f"des-seq:k={min(3, k)}", "des-vote:beta=0.5",
            "des-vote:beta=0.3", "des-vote:beta=0.15", f"des-vote:beta=0.3,{GUARD}",
        ]  # fmt: skip
        prompts = lab.questions()
        timed = {p: Timed(policy=p, rounds=[], tokens=0, forwards=0, experts=0) for p in policies}
        lab.engine.generate(prompts[0])  # the first forwards of a process are slow
        for turn in range(ROUNDS):
            for place, policy in enumerate(policies):
                lab.tell((turn + place / len(policies)) / ROUNDS, f"{policy}, round {turn + 1}")
                began = time.perf_counter()
                results = [lab.engine.generate(prompt, policy=policy) for prompt in prompts]
                seconds = time.perf_counter() - began
                one = timed[policy]
                one["tokens"] = sum(result.new_tokens for result in results)
                one["forwards"] = sum(result.forwards for result in results)
                one["experts"] = statistics.fmean(result.experts.mean for result in results)
                one["rounds"].append(one["tokens"] / seconds)
        return {"timed": list(timed.values()), "prompts": len(prompts)}

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        timed = cast("list[Timed]", facts["timed"])
        caption = (
            "Tokens a second of one row at a time: the median of the rounds, with the least and "
            "the most."
        )
        return [Drawing(self.name, caption, lambda: _bars(timed))]

    def tables(self, facts: Facts) -> Sequence[Table]:
        timed = cast("list[Timed]", facts["timed"])
        base = statistics.median(timed[0]["rounds"])
        rows = [
            [
                one["policy"],
                f"{statistics.median(one['rounds']):.0f}",
                f"{min(one['rounds']):.0f} to {max(one['rounds']):.0f}",
                f"{statistics.median(one['rounds']) / base:.2f}",
                f"{one['experts']:.1f}",
                f"{one['forwards']}",
            ]
            for one in timed
        ]
        heads = ["policy", "tokens/s", "rounds", "of vanilla's", "experts", "forwards"]
        caption = f"{facts['prompts']} questions, one at a time, {ROUNDS} rounds in turns."
        return [Table(heads, rows, caption, numbers=range(1, 6))]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        timed = cast("list[Timed]", facts["timed"])
        base = statistics.median(timed[0]["rounds"])
        des = [one for one in timed if one["policy"].startswith("des-")]
        best = max(des, key=lambda one: statistics.median(one["rounds"]))
        speed = statistics.median(best["rounds"])
        apart = min(best["rounds"]) > max(timed[0]["rounds"])
        saved = 1 - base / speed
        return [
            Finding(
                f"The fastest DES policy here is {best['policy']} with {speed:.0f} tokens a "
                f"second, vanilla writes {base:.0f} ({speed / base:.2f} times). On a model that "
                "lives in a processor's cache and is run by plain operations, reading fewer "
                "experts saves little, and the vote costs some.",
                f"DES cuts latency by up to {HEADLINE:.0%}.",
                "holds" if apart and saved >= HEADLINE else "does not hold",
            )
        ]


def _per_block(tally: Tally) -> float:
    return tally.experts * tally.forwards_per_block


def _less(ratio: float) -> str:
    return f"{1 - ratio:.0%} fewer" if ratio < 1 else f"{ratio - 1:.0%} more"


def _draw(arms: Arms) -> Figure:
    figure, one = axes(f"unique experts of {arms.experts}, a layer and forward", "forwards a block")
    whole = _per_block(arms.vanilla)
    most = max(t.forwards_per_block for group in arms.groups.values() for t in group)
    xs = [whole / (1 + (most - 1) * step / 50) for step in range(51)]
    one.plot(
        xs,
        [whole / x for x in xs],
        color=ink(),
        lw=0.9,
        ls="--",
        label="as much read as by vanilla",
    )
    for label, tallies in arms.groups.items():
        dress = look(tallies[-1].policy)
        ordered = sorted(tallies, key=lambda tally: tally.experts)
        one.plot(
            [t.experts for t in ordered], [t.forwards_per_block for t in ordered],
            color=dress.colour, marker=dress.marker, label=label,
        )  # fmt: skip
    vanilla = arms.vanilla
    one.plot([vanilla.experts], [vanilla.forwards_per_block], marker="*", ms=11, ls="",
             color=colour("vanilla"), label="vanilla")  # fmt: skip
    one.set(xlim=(0, None), ylim=(0, None))
    legend(one, columns=2)
    return figure


def _bars(timed: Sequence[Timed]) -> Figure:
    figure, one = axes("tokens a second", height=0.42 * len(timed) + 0.9)
    places = range(len(timed))
    middles = [statistics.median(t["rounds"]) for t in timed]
    low = [m - min(t["rounds"]) for m, t in zip(middles, timed, strict=True)]
    high = [max(t["rounds"]) - m for m, t in zip(middles, timed, strict=True)]
    colours = [colour(t["policy"]) for t in timed]
    one.barh(places, middles, color=colours, height=0.65, xerr=[low, high], ecolor=ink(),
             error_kw={"elinewidth": 0.9})  # fmt: skip
    labels = [t["policy"].replace(f",{GUARD}", ", guarded") for t in timed]
    one.set_yticks(list(places), labels)
    one.invert_yaxis()
    one.grid(visible=False, axis="y")
    return figure
