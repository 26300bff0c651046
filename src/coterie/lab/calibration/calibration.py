"""Finds the parameter of a policy family that meets a target on given prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.errors import CoterieError
from coterie.lab.calibration.budget import per_layer_search_space
from coterie.lab.calibration.frontier import FrontierPoint, best_point, find_frontier
from coterie.lab.calibration.measurement import (
    POLICIES_PER_PASS,
    VANILLA,
    PolicyEvaluator,
    PolicyRun,
)
from coterie.lab.calibration.search import BoundarySearch
from coterie.lab.calibration.search_space import SearchFamily, SearchSpace
from coterie.lab.calibration.target import Estimate, Target, TargetKind

# Votes and losses are compared on equal inputs. Experts and accuracy depend on what a policy does
# to the text that it decodes, so they are measured to the end.
TRACE_KINDS: tuple[TargetKind, ...] = ("mass", "loss")
INITIAL_POINTS = 7  # rungs spread over the ladder before accuracy is bisected


@dataclass(frozen=True)
class MeasuredPolicy:
    """One policy that was measured on the way."""

    policy: str
    estimate: Estimate


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
    achieved: Estimate
    neighbor: MeasuredPolicy | None
    is_monotonic: bool
    steps: tuple[MeasuredPolicy, ...]  # in the order taken
    frontier_points: tuple[FrontierPoint, ...]  # of the frontier, where there is one
    run: PolicyRun
    vanilla: PolicyRun


def calibrate(
    evaluator: PolicyEvaluator,
    family: SearchFamily | str,
    target: Target | str,
    *,
    per_layer: bool = False,
) -> Calibration:
    """The gentlest policy with so few experts, or the most thrifty one that meets another target.

    ``mass`` and ``loss`` are read on the inputs of vanilla's forwards, ``experts`` and ``drop``
    from decoding to the end. ``per_layer`` searches budgets shared out by marginal votes. MC-MoE
    without ``protect`` is searched along its frontier. Raises CoterieError, which names what can
    be reached, where nothing meets the target.
    """
    family = SearchFamily.parse(family) if isinstance(family, str) else family
    target = Target.parse(target) if isinstance(target, str) else target
    check_target(evaluator, family, target)
    points: list[FrontierPoint] = []
    if has_two_thresholds(family):
        points = find_frontier(evaluator, family, target)
        family = family.with_fixed("protect", best_point(points, target).protect)
    if per_layer:
        space = per_layer_search_space(evaluator, family)
    else:
        space = family.search_space(evaluator.engine.model.spec.router)
    return _search(evaluator, space, target, points)


def check_target(evaluator: PolicyEvaluator, family: SearchFamily, target: Target) -> None:
    """Raises for what would fail after the first hour."""
    family.search_space(evaluator.engine.model.spec.router)
    if target.kind == "drop" and not evaluator.prompt_set.is_graded:
        raise CoterieError("drop needs graded prompts: give --task instead of --prompts")
    if target.kind == "drop" and has_two_thresholds(family):
        raise CoterieError(
            f"{family.name}: accuracy does not choose between two thresholds; fix one, such as "
            f"{family.name}:protect=0.02"
        )


def has_two_thresholds(family: SearchFamily) -> bool:
    """Whether MC-MoE's ``protect`` is free too."""
    return family.name == "mc-moe" and not family.is_fixed("protect")


def _search(
    evaluator: PolicyEvaluator, space: SearchSpace, target: Target, points: Sequence[FrontierPoint]
) -> Calibration:
    def measure(indices: Sequence[int]) -> list[Estimate]:
        return measure_policies(
            evaluator, target.kind, [space.policy_at(index) for index in indices]
        )

    on_trace = target.kind in TRACE_KINDS
    initial_points = INITIAL_POINTS if target.kind == "drop" else 1
    searcher = BoundarySearch(
        batch_size=POLICIES_PER_PASS if on_trace else 1, initial_points=initial_points
    )
    result = searcher.find(target, len(space), measure)
    neighbor = result.index - 1 if target.met_by_fewer_experts else result.index + 1
    steps = {
        index: MeasuredPolicy(space.policy_at(index), estimate)
        for index, estimate in result.estimates.items()
    }
    policy = steps[result.index].policy
    return Calibration(
        family=space.family,
        target=target,
        policy=policy,
        achieved=steps[result.index].estimate,
        neighbor=steps.get(neighbor),
        is_monotonic=result.is_monotonic,
        steps=tuple(steps.values()),
        frontier_points=tuple(points),
        run=evaluator.run(policy),
        vanilla=evaluator.run(VANILLA),
    )


def measure_policies(
    evaluator: PolicyEvaluator, kind: TargetKind, policies: Sequence[str]
) -> list[Estimate]:
    """Of each policy, measured as this kind of target is."""
    if kind in TRACE_KINDS:
        estimates = evaluator.estimate_on_trace(policies, with_loss=kind == "loss")
        return [estimates_of_policy.estimate(kind) for estimates_of_policy in estimates]
    if kind == "drop":
        vanilla = evaluator.run(VANILLA)
        return [evaluator.run(policy).drop_estimate(vanilla) for policy in policies]
    return [evaluator.run(policy).experts_estimate() for policy in policies]
