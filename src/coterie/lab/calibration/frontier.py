"""MC-MoE's two thresholds: the frontier of pairs that just meet a target, and its best point.

After the frontier search of MoDES (arXiv 2511.15690): the experts used fall with ``beta`` and rise
with ``protect``, so along a rising ``protect`` the ``beta`` that just meets a target never falls,
and each search begins where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.errors import CoterieError
from coterie.lab.calibration.measurement import POLICIES_PER_PASS, PolicyEvaluator, TraceEstimates
from coterie.lab.calibration.search import BoundarySearch
from coterie.lab.calibration.search_space import SearchFamily
from coterie.lab.calibration.target import Estimate, Target

PROTECT_VALUES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares of a window's tokens


@dataclass(frozen=True)
class FrontierPoint:
    """One pair of the frontier, on vanilla's forwards: what it uses and what it loses."""

    policy: str
    protect: float
    experts: Estimate
    loss: Estimate


def find_frontier(
    evaluator: PolicyEvaluator, family: SearchFamily, target: Target
) -> list[FrontierPoint]:
    """For each of ``PROTECTED``, the policy that just meets the target on vanilla's forwards.

    Shares with which nothing meets it are left out; raises the CoterieError of the last where
    none is left.
    """
    policy_by_protect: dict[float, str] = {}
    last_error: CoterieError | None = None
    first = 0
    for protect in PROTECT_VALUES:
        space = family.with_fixed("protect", protect).search_space(
            evaluator.engine.model.spec.router
        )
        policies = [space.policy_at(index) for index in range(first, len(space))]

        def measure(indices: Sequence[int], policies: Sequence[str] = policies) -> list[Estimate]:
            seen = evaluator.estimate_on_trace(
                [policies[index] for index in indices], with_loss=target.kind == "loss"
            )
            return [estimate.estimate(target.kind) for estimate in seen]

        try:
            index = (
                BoundarySearch(batch_size=POLICIES_PER_PASS)
                .find(target, len(policies), measure)
                .index
            )
        except CoterieError as error:
            last_error = error
            continue
        policy_by_protect[protect] = policies[index]
        first += index
    if not policy_by_protect and last_error is not None:
        raise last_error
    estimates = evaluator.estimate_on_trace(list(policy_by_protect.values()), with_loss=True)
    return [
        _point(policy, protect, estimate)
        for (protect, policy), estimate in zip(policy_by_protect.items(), estimates, strict=True)
    ]


def best_point(points: Sequence[FrontierPoint], target: Target) -> FrontierPoint:
    """Of pairs with as many experts the one that loses least; else the one with fewest experts."""
    if target.kind == "experts":
        return min(points, key=lambda point: point.loss.value)
    return min(points, key=lambda point: point.experts.value)


def _point(policy: str, protect: float, estimates: TraceEstimates) -> FrontierPoint:
    return FrontierPoint(policy, protect, estimates.estimate("experts"), estimates.estimate("loss"))
