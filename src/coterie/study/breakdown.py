"""Latency by part (Fig. 2, left): where a decoding forward spends its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypedDict, cast

from matplotlib.figure import Figure

from coterie.bench.timing import Conditions, Spread, conditions, crowded, on, spread
from coterie.engine.engine import Engine
from coterie.engine.event import Denoised
from coterie.figures.style import SERIES, axes
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.lab import Lab
from coterie.study.parts import (
    ELECTION,
    EXPERTS,
    GATE,
    PARTS,
    REST,
    SHARED,
    Stopwatch,
    timed,
)

POLICIES = ("vanilla", "des-seq:k=3", "des-vote:beta=0.3")
ROUNDS = 5
PROMPTS = 8
MOE = (EXPERTS, GATE, ELECTION, SHARED)  # what the paper calls the MoE layer


class Breakdown(TypedDict):
    """Decoding forwards of one row under one policy; ``shares`` are of all their time, and
    ``experts`` the unique experts of a layer."""

    policy: str
    forward: Spread
    parts: dict[str, Spread]
    shares: dict[str, float]
    experts: float


class Found(TypedDict):
    prompts: int
    rounds: int
    block: int
    machine: Conditions
    policies: list[Breakdown]


@dataclass(frozen=True)
class Parts:
    """One row at a time, prompts and policies taking turns, every part of the model timed."""

    name: str = "breakdown"
    title: str = "Where a decoding forward spends its time (Fig. 2, left)"
    question: str = (
        "One forward runs attention, a router, the experts and more. "
        "How large a part of its time are the experts, so how much can a coreset save?"
    )

    rounds: int = ROUNDS

    def measure(self, lab: Lab) -> Facts:
        prompts = lab.questions()[:PROMPTS]
        watch = Stopwatch(lab.engine.model.transformer.device)
        engine = Engine(timed(lab.engine.model, watch), generation=lab.engine.generation)
        taken: dict[str, list[tuple[dict[str, float], float]]] = {p: [] for p in POLICIES}
        turns = [(prompt, policy) for prompt in prompts for policy in POLICIES]
        answer_timed(engine, watch, prompts[0], POLICIES[0])  # warms up
        for number in range(self.rounds):
            for at, (prompt, policy) in enumerate(turns):
                done = (number + at / len(turns)) / self.rounds
                lab.tell(done, f"forwards under {policy}, part by part")
                taken[policy] += answer_timed(engine, watch, prompt, policy)
        found = Found(
            prompts=len(prompts),
            rounds=self.rounds,
            block=lab.engine.generation.block,
            machine=conditions(lab.engine.model.transformer.device),
            policies=[broken_down(policy, forwards) for policy, forwards in taken.items()],
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        return [
            Drawing(
                self.name,
                f"A decoding forward's time by part; one row, blocks of {found['block']}, "
                f"{on(found['machine'])}. The rest is the embedding, the head and "
                "the choice of words.",
                lambda: _draw(found),
            )
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        policies = found["policies"]
        parts = [part for part in PARTS if any(part in each["parts"] for each in policies)]
        rows = [[part, *(_cell(each, part) for each in policies)] for part in parts]
        whole = ["the whole forward", *(_milliseconds(each["forward"]) for each in policies)]
        forwards = ", ".join(f"{each['forward']['samples']}" for each in policies)
        return [
            Table(
                heads=["part", *(each["policy"] for each in policies)],
                rows=[*rows, whole],
                caption="Median milliseconds of a decoding forward, and the share of all time. "
                f"{forwards} forwards; quartiles behind the median of the whole.",
                numbers=list(range(1, len(policies) + 1)),
            )
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        plain = found["policies"][0]
        inside = sum(plain["shares"].get(part, 0.0) for part in MOE)
        experts = plain["shares"].get(EXPERTS, 0.0)
        most = max(plain["shares"], key=lambda part: plain["shares"][part])
        return [
            Finding(
                f"Under vanilla the MoE layers take {inside:.0%} of a forward, the experts "
                f"themselves {experts:.0%}; the largest part is {most}. If experts cost nothing, a "
                f"forward would be {1 / (1 - experts):.1f} times as fast, and no more.",
                claim="The MoE layers take most of a decoding forward's time.",
                verdict="holds" if inside > 0.5 else "does not hold",
            ),
            *(_saving(plain, other) for other in found["policies"][1:]),
            *crowded(found["machine"]),
        ]


def answer_timed(
    engine: Engine, watch: Stopwatch, prompt: str, policy: str
) -> list[tuple[dict[str, float], float]]:
    """Laps of every decoding forward of one answer, and the mean unique experts of its layers."""
    number, taken = engine.submit(prompt, policy=policy), []
    while number in engine.rows:
        watch.laps = {}
        with watch(REST):
            events = engine.step()
        for event in events:
            if isinstance(event, Denoised) and event.experts:
                taken.append((watch.laps, fmean(event.experts)))
    return taken


def broken_down(policy: str, forwards: Sequence[tuple[dict[str, float], float]]) -> Breakdown:
    """From the laps and the experts of every forward; a part that never ran is not there."""
    laps = [lap for lap, _ in forwards]
    wholes = [sum(lap.values()) for lap in laps]
    ran = [part for part in PARTS if any(part in lap for lap in laps)]
    parts = {part: [lap.get(part, 0.0) for lap in laps] for part in ran}
    return Breakdown(
        policy=policy,
        forward=spread(wholes),
        parts={part: spread(seconds) for part, seconds in parts.items()},
        shares={part: sum(seconds) / sum(wholes) for part, seconds in parts.items()},
        experts=fmean(used for _, used in forwards),
    )


def _draw(found: Found) -> Figure:
    policies = found["policies"]
    figure, one = axes("milliseconds of the median forward", "", height=3.6)
    for place, each in enumerate(policies):
        left, whole = 0.0, each["forward"]["median"]
        for part, paint in zip(PARTS, SERIES, strict=True):
            share = each["shares"].get(part, 0.0)
            width = share * whole * 1e3
            if share:
                one.barh(place, width, left=left, color=paint, label=part, height=0.5)
            if share >= 0.08:
                middle = left + width / 2
                one.text(middle, place, f"{share:.0%}", ha="center", va="center", color="white")
            left += width
        one.text(0, place - 0.3, each["policy"], va="bottom")
    one.set(yticks=[], ylim=(len(policies) - 0.6, -0.75))
    one.grid(axis="y", visible=False)
    one.spines["left"].set_visible(False)
    handles, labels = one.get_legend_handles_labels()
    by_part = dict(zip(labels, handles, strict=True))
    figure.legend(by_part.values(), by_part.keys(), loc="outside lower left", ncols=3)
    return figure


def _saving(plain: Breakdown, other: Breakdown) -> Finding:
    before, after = plain["parts"].get(EXPERTS), other["parts"].get(EXPERTS)
    saved = before["median"] - after["median"] if before and after else 0.0
    election = other["parts"][ELECTION]["median"] if ELECTION in other["parts"] else 0.0
    routing = other["parts"][GATE]["median"] - plain["parts"][GATE]["median"] + election
    ratio = plain["forward"]["median"] / other["forward"]["median"]
    return Finding(
        f"{other['policy']} uses {other['experts']:.0f} experts of a layer in place of "
        f"{plain['experts']:.0f}: a forward saves {saved * 1e3:.2f} ms in the experts and pays "
        f"{routing * 1e3:.2f} ms for election and constrained routing. It is {ratio:.2f} times as "
        "fast as vanilla.",
        claim="A coreset makes the forward faster.",
        verdict="holds" if other["forward"]["high"] < plain["forward"]["low"] else "does not hold",
    )


def _cell(each: Breakdown, part: str) -> str:
    if part not in each["parts"]:
        return ""
    return f"{each['parts'][part]['median'] * 1e3:.2f} ({each['shares'][part]:.0%})"


def _milliseconds(taken: Spread) -> str:
    low, high = taken["low"] * 1e3, taken["high"] * 1e3
    return f"{taken['median'] * 1e3:.2f} [{low:.2f} to {high:.2f}]"
