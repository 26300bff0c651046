"""Finds the parameter of a policy family that meets a target on given prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.calibration.bench import TOGETHER, VANILLA, Bench, Run
from coterie.calibration.budget import layered_ladder
from coterie.calibration.frontier import Point, best, frontier
from coterie.calibration.ladder import Family, Ladder
from coterie.calibration.search import Searcher
from coterie.calibration.target import Kind, Reading, Target
from coterie.naming import CoterieError

# Votes and losses are compared on equal inputs. Experts and accuracy depend on what a policy does
# to the text that it decodes, so they are measured to the end.
ON_TRACE: tuple[Kind, ...] = ("mass", "loss")
COARSE = 7  # rungs spread over the ladder before accuracy is bisected


@dataclass(frozen=True)
class Step:
    """One policy that was measured on the way."""

    policy: str
    reading: Reading


@dataclass(frozen=True)
class Calibration:
    """The policy that was found, and the proof of it.

    ``beyond`` is its neighbour on the ladder, which does not meet the target: one rung gentler for
    experts, one more thrifty for all else; None where the ladder ends. ``ordered``: every reading
    agrees with the order that a bisection takes for granted. ``run`` and ``vanilla`` decode the
    same prompts to their end.
    """

    family: str
    target: Target
    policy: str
    achieved: Reading
    beyond: Step | None
    ordered: bool
    steps: tuple[Step, ...]  # in the order taken
    points: tuple[Point, ...]  # of the frontier, where there is one
    run: Run
    vanilla: Run


def calibrate(
    bench: Bench, family: Family | str, target: Target | str, *, per_layer: bool = False
) -> Calibration:
    """The gentlest policy with so few experts, or the most thrifty one that meets another target.

    ``mass`` and ``loss`` are read on the inputs of vanilla's forwards, ``experts`` and ``drop``
    from decoding to the end. ``per_layer`` searches budgets shared out by marginal votes. MC-MoE
    without ``protect`` is searched along its frontier. Raises CoterieError, which names what can
    be reached, where nothing meets the target.
    """
    family = Family.of(family) if isinstance(family, str) else family
    target = Target.of(target) if isinstance(target, str) else target
    check(bench, family, target)
    points: list[Point] = []
    if two_thresholds(family):
        points = frontier(bench, family, target)
        family = family.fixing("protect", best(points, target).protect)
    if per_layer:
        ladder = layered_ladder(bench, family)
    else:
        ladder = family.ladder(bench.engine.model.spec.router)
    return _found(bench, ladder, target, points)


def check(bench: Bench, family: Family, target: Target) -> None:
    """Raises for what would fail after the first hour."""
    family.ladder(bench.engine.model.spec.router)
    if target.kind == "drop" and not bench.questions.graded:
        raise CoterieError("drop needs graded prompts: give --task instead of --prompts")
    if target.kind == "drop" and two_thresholds(family):
        raise CoterieError(
            f"{family.name}: accuracy does not choose between two thresholds; fix one, such as "
            f"{family.name}:protect=0.02"
        )


def two_thresholds(family: Family) -> bool:
    """Whether MC-MoE's ``protect`` is free too."""
    return family.name == "mc-moe" and not family.fixes("protect")


def _found(bench: Bench, ladder: Ladder, target: Target, points: Sequence[Point]) -> Calibration:
    def measure(rungs: Sequence[int]) -> list[Reading]:
        return readings(bench, target.kind, [ladder.spelling(rung) for rung in rungs])

    on_trace = target.kind in ON_TRACE
    coarse = COARSE if target.kind == "drop" else 1
    searcher = Searcher(together=TOGETHER if on_trace else 1, coarse=coarse)
    found = searcher.find(target, len(ladder), measure)
    beside = found.rung - 1 if target.grows_with_thrift else found.rung + 1
    steps = {rung: Step(ladder.spelling(rung), one) for rung, one in found.readings.items()}
    policy = steps[found.rung].policy
    return Calibration(
        family=ladder.family,
        target=target,
        policy=policy,
        achieved=steps[found.rung].reading,
        beyond=steps.get(beside),
        ordered=found.ordered,
        steps=tuple(steps.values()),
        points=tuple(points),
        run=bench.run(policy),
        vanilla=bench.run(VANILLA),
    )


def readings(bench: Bench, kind: Kind, policies: Sequence[str]) -> list[Reading]:
    """Of each policy, measured as this kind of target is."""
    if kind in ON_TRACE:
        seen = bench.on_trace(policies, losses=kind == "loss")
        return [one.reading(kind) for one in seen]
    if kind == "drop":
        vanilla = bench.run(VANILLA)
        return [bench.run(policy).drop_reading(vanilla) for policy in policies]
    return [bench.run(policy).experts_reading() for policy in policies]
