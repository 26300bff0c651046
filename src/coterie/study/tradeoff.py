"""Latency of the MoE layer against accuracy (Fig. 1d)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, cast

from matplotlib.figure import Figure

from coterie.bench.routings import BLOCK
from coterie.bench.timing import (
    Conditions,
    Fit,
    Spread,
    conditions,
    crowded,
    in_turns,
    mean_spread,
    predicted,
)
from coterie.engine.watch import Watched, collect
from coterie.figures.style import axes, ink, legend, look, percent
from coterie.naming import CoterieError
from coterie.routing import parse_policy, route
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.lab import Lab
from coterie.study.latency import Line
from coterie.study.layers import moe_layers, whole_layer
from coterie.study.routings import FORWARDS, PROMPTS
from coterie.study.tally import Arms, Tally

VANILLA = "vanilla"
# Routes as vanilla does, but has the importance of tokens worked out, which mc-moe asks for.
WATCHED = "mc-moe:beta=0,protect=0"
ROUNDS = 8
LIKELY = 0.05  # p from which an accuracy cannot be told from vanilla's


class Point(TypedDict):
    """One policy. ``used`` and ``pairs`` were counted on the forwards that were timed; a pair is
    one token's use of one expert. ``p``: McNemar's, against vanilla on the same items."""

    policy: str
    accuracy: float
    interval: list[float]
    p: float
    items: int
    used: float
    pairs: float  # for each token
    seconds: Spread


class Other(TypedDict):
    """A layer of another shape, whose latency is predicted: its name, experts and fit."""

    name: str
    experts: int
    fit: Fit


class Found(TypedDict):
    experts: int
    machine: Conditions
    forwards: int
    points: list[Point]
    others: list[Other]


@dataclass(frozen=True)
class Tradeoff:
    """Accuracy from the accuracy chapter; latency of the whole layer (gate, selection, experts) on
    the same real forwards for all policies. Large layers are predicted, and said to be."""

    name: str = "latency-accuracy"
    title: str = "Latency of the MoE layer against accuracy (Fig. 1d)"
    question: str = "Which policies make the layers of experts faster, and what do they cost?"

    rounds: int = ROUNDS

    def measure(self, lab: Lab) -> Facts:
        record = lab.record("accuracy")
        if record is None:
            raise CoterieError("needs the record of the chapter accuracy: ask for both")
        arms = Arms.of(record)
        tallies = [t for t in arms.tallies.values() if t.generation == arms.vanilla.generation]
        lab.tell(0.0, "forwards to time")
        seen = collect(
            lab.engine, lab.questions()[:PROMPTS], policy=WATCHED, rows=1, forwards=FORWARDS
        )
        points = timed_policies(lab, seen, tallies, arms.vanilla, rounds=self.rounds)
        latency = lab.record("latency")
        lines = cast("list[Line]", latency["lines"]) if latency is not None else []
        others = [
            Other(name=one["bench"]["name"], experts=one["bench"]["experts"], fit=one["fit"])
            for one in lines
            if one["bench"]["random"]
        ]
        found = Found(
            experts=arms.experts,
            machine=conditions(lab.engine.model.transformer.device),
            forwards=len(seen),
            points=points,
            others=others,
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        own = Drawing(
            self.name,
            "Accuracy with its 95 % interval against the measured time of the model's own MoE "
            "layer. The line joins the policies that no other beats in both.",
            lambda: _draw(found, _measured(found), "milliseconds of the MoE layer, measured"),
        )
        return [own, *(self._predicted(found, other) for other in found["others"])]

    def _predicted(self, found: Found, other: Other) -> Drawing:
        return Drawing(
            f"{self.name}-{other['name'].lower()}",
            "The same accuracy (of the small model) against the time of the experts of a layer of "
            f"{other['name']}'s shape, predicted by the fit of Equation 2 for the same share of "
            "its experts; the selection is not in it.",
            lambda: _draw(
                found,
                [foretold(point, found, other) for point in found["points"]],
                f"milliseconds of {other['name']}'s experts, predicted",
            ),
        )

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        others = found["others"]
        rows = [
            [
                point["policy"],
                f"{point['accuracy']:.1%}",
                f"{point['interval'][0]:.1%} to {point['interval'][1]:.1%}",
                f"{point['used']:.1f}",
                f"{point['seconds']['median'] * 1e3:.3f}",
                f"{point['seconds']['low'] * 1e3:.3f} to {point['seconds']['high'] * 1e3:.3f}",
                *(f"{foretold(point, found, other) * 1e3:.1f}" for other in others),
            ]
            for point in sorted(found["points"], key=lambda point: -point["accuracy"])
        ]
        heads = ["policy", "right", "95 %", "experts", "layer, ms", "quartiles"]
        heads += [f"{other['name']}, ms (predicted)" for other in others]
        return [
            Table(
                heads=heads,
                rows=rows,
                caption=f"{found['points'][0]['items']} items; the layer was timed on "
                f"{found['forwards']} real inputs of layers, the same for all policies.",
                numbers=list(range(1, len(heads))),
            )
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        told = [_there(found, other) for other in found["others"]]
        return [_own(found), *told, *crowded(found["machine"])]


def timed_policies(
    lab: Lab, seen: Sequence[Watched], tallies: Sequence[Tally], vanilla: Tally, *, rounds: int
) -> list[Point]:
    """The whole layer of every watched input under every policy, in turns."""
    moes = {moe.layer: moe for moe in moe_layers(lab.engine.model.transformer)}
    works: dict[tuple[str, int], Callable[[], object]] = {
        (tally.policy, at): whole_layer(moes[watched.layer], watched, parse_policy(tally.policy))
        for tally in tallies
        for at, watched in enumerate(seen)
    }
    taken = in_turns(
        works,
        rounds,
        device=lab.engine.model.transformer.device,
        tell=lambda share: lab.tell(share, "the layer under every policy"),
    )
    points = []
    for tally in tallies:
        share, (used, pairs) = tally.share(), sizes(seen, tally.policy)
        points.append(
            Point(
                policy=tally.policy,
                accuracy=share.value,
                interval=list(share.interval),
                p=tally.against(vanilla).p,
                items=share.n,
                used=used,
                pairs=pairs,
                seconds=mean_spread([taken[tally.policy, at] for at in range(len(seen))]),
            )
        )
    return points


def sizes(seen: Sequence[Watched], policy: str) -> tuple[float, float]:
    """Mean unique experts, and mean experts of a token."""
    chosen = parse_policy(policy)
    routings = [route(replace(watched.scores, own=None), chosen) for watched in seen]
    used = sum(float(routing.used.sum()) for routing in routings) / len(routings)
    pairs = sum(float((routing.ids >= 0).sum(-1).double().mean()) for routing in routings)
    return used, pairs / len(routings)


def foretold(point: Point, found: Found, other: Other) -> float:
    """Seconds of another layer's experts, at the same share of experts and use of them."""
    experts = point["used"] / found["experts"] * other["experts"]
    return predicted(other["fit"], experts, point["pairs"] * BLOCK)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, gain): those that nothing beats in both, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def _measured(found: Found) -> list[float]:
    return [point["seconds"]["median"] for point in found["points"]]


def _draw(found: Found, seconds: Sequence[float], label: str) -> Figure:
    figure, one = axes(label, "right answers", height=4.2)
    places = [(s * 1e3, p["accuracy"]) for s, p in zip(seconds, found["points"], strict=True)]
    best = front(places)
    one.plot(*zip(*best, strict=True), color=ink(), linewidth=0.8, drawstyle="steps-post")
    for (x, y), point in zip(places, found["points"], strict=True):
        low, high = point["interval"]
        one.errorbar(
            x,
            y,
            yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
            color=look(point["policy"]).colour,
            marker=look(point["policy"]).marker,
            linestyle="",
            elinewidth=0.8,
            label=look(point["policy"]).name,
        )
    one.set(ylim=(-0.02, 1.04), xlim=(0, None))
    percent(one)
    legend(one, columns=3)
    return figure


def _as_good(found: Found) -> list[Point]:
    """Policies whose accuracy cannot be told from vanilla's."""
    others = [point for point in found["points"] if point["policy"] != VANILLA]
    return [point for point in others if point["p"] >= LIKELY]


def _vanilla(found: Found) -> Point:
    return next(point for point in found["points"] if point["policy"] == VANILLA)


def _own(found: Found) -> Finding:
    plain, good = _vanilla(found), _as_good(found)
    claim = "A coreset lowers the latency of the MoE layer at next to no cost in accuracy."
    if not good:
        return Finding("No policy is as right as vanilla.", claim, "does not hold")
    best = min(good, key=lambda point: point["seconds"]["median"])
    ratio = plain["seconds"]["median"] / best["seconds"]["median"]
    faster = best["seconds"]["high"] < plain["seconds"]["low"]
    return Finding(
        f"Of {len(good)} policies whose accuracy cannot be told from vanilla's, {best['policy']} "
        f"runs the model's own layer fastest: {best['seconds']['median'] * 1e3:.3f} ms against "
        f"{plain['seconds']['median'] * 1e3:.3f}, {ratio:.2f} times as fast, with "
        f"{best['used']:.0f} experts in place of {plain['used']:.0f}.",
        claim=claim,
        verdict="holds" if faster else "does not hold",
    )


def _there(found: Found, other: Other) -> Finding:
    good = [_vanilla(found), *_as_good(found)]
    best = min(good, key=lambda point: foretold(point, found, other))
    before, after = (foretold(point, found, other) for point in (good[0], best))
    return Finding(
        f"In a layer of {other['name']}'s shape the same share of experts would take "
        f"{after * 1e3:.0f} ms under {best['policy']} and {before * 1e3:.0f} under vanilla, "
        f"{before / after:.2f} times as fast. That is predicted by the fit, with the accuracy of "
        "the small model.",
        claim="The same, in a large model.",
        verdict="cannot be told here",
    )
