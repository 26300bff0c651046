"""Finds the parameter of a policy family that meets a target on given prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from coterie.errors import ConfigError, CoterieError
from coterie.keys import Key, to_json
from coterie.lab.calibration.measurement import (
    POLICIES_PER_PASS,
    VANILLA,
    PolicyEvaluator,
    PolicyRun,
)
from coterie.lab.calibration.search_space import SearchFamily, per_layer_policies
from coterie.lab.calibration.target import VALUE_FORMAT, Estimate, Target, TargetKind

MeasureCandidates = Callable[[Sequence[int]], Sequence[Estimate]]  # of ascending indices

# Votes and losses are compared on equal inputs. Experts and accuracy depend on the text that a
# policy decodes, so each policy decodes all prompts.
TRACE_KINDS: tuple[TargetKind, ...] = ("mass", "loss")
PROTECT_VALUES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares of a window's tokens
INITIAL_POINTS = 7  # evenly spaced candidates that are measured before a bisection that may err
MAX_PAST_EDGE = 2  # consecutive points past the edge that end a pass over evenly spaced points


@dataclass(frozen=True)
class MeasuredPolicy:
    """A policy that the search measured."""

    policy: str
    estimate: Estimate

    def to_dict(self) -> dict[str, object]:
        return {"policy": self.policy, **to_json(self.estimate)}


@dataclass(frozen=True)
class FrontierPoint:
    """One policy of the frontier, measured on the forwards of vanilla routing."""

    protect: float
    policy: Annotated[str, Key("policy")]
    experts: Annotated[Estimate, Key("experts")]
    loss: Annotated[Estimate, Key("loss")]


@dataclass(frozen=True)
class Calibration:
    """The selected policy, and the measurements that led to it.

    ``neighbor`` is the adjacent candidate, which does not meet the target: with one more expert for
    a target on experts, with fewer experts for all others. It is None at the end of the list.
    """

    family: str
    target: Target
    policy: str
    achieved: Estimate
    neighbor: MeasuredPolicy | None
    is_monotonic: bool  # all estimates agree with the order that a bisection assumes
    steps: tuple[MeasuredPolicy, ...]  # in the order of measurement
    frontier_points: tuple[FrontierPoint, ...]  # of MC-MoE, else empty
    run: PolicyRun  # of the selected policy, on the same prompts as ``vanilla``
    vanilla: PolicyRun

    def describe(self) -> list[str]:
        """The policy, its cost, and a warning where the search was not monotonic."""
        value, interval = self.achieved.format()
        noun, n = self.target.spec.description, self.achieved.n
        work = "on masked text" if self.target.kind == "bits" else "its decoding"
        lines = [
            f"{self.policy} meets {self.target}: {noun} {value} ({interval}) "
            f"on {n} prompt{'s' * (n != 1)}",
            f"{work}: {self.run.describe()}; vanilla: {self.vanilla.describe()}",
        ]
        if not self.is_monotonic:
            lines.append(f"{noun} is not monotonic in this search: another policy may do as well")
        return lines


def calibrate(
    evaluator: PolicyEvaluator,
    family: SearchFamily | str,
    target: Target | str,
    *,
    per_layer: bool = False,
) -> Calibration:
    """The policy with the fewest experts that meets a target.

    A target on ``experts`` selects the policy with the most experts that meets it. ``mass`` and
    ``loss`` are measured on the inputs of vanilla's forwards, ``bits`` on masked text, and
    ``experts`` and ``drop`` by decoding.
    ``per_layer`` searches budgets per layer. MC-MoE without ``protect`` is searched along its
    frontier. Raises ConfigError with the reachable range if no policy meets the target.
    """
    family = SearchFamily.parse(family) if isinstance(family, str) else family
    target = Target.parse(target) if isinstance(target, str) else target
    check_target(evaluator, family, target)
    points: list[FrontierPoint] = []
    if _has_two_thresholds(family):
        points = find_frontier(evaluator, family, target)
        family = family.with_fixed("protect", best_point(points, target).protect)
    if per_layer:
        policies = per_layer_policies(evaluator, family)
    else:
        policies = family.policies(evaluator.engine.model.spec.router)
    on_trace = target.kind in TRACE_KINDS
    search = BoundarySearch(
        batch_size=POLICIES_PER_PASS if on_trace else 1,
        initial_points=INITIAL_POINTS if target.kind in ("drop", "bits") else 1,
    )
    result = search.find(
        target,
        len(policies),
        lambda indices: measure_policies(evaluator, target.kind, [policies[i] for i in indices]),
    )
    run = evaluator.text_run if target.kind == "bits" else evaluator.run
    steps = {i: MeasuredPolicy(policies[i], estimate) for i, estimate in result.estimates.items()}
    return Calibration(
        family=str(family),
        target=target,
        policy=policies[result.index],
        achieved=result.estimates[result.index],
        neighbor=steps.get(result.index + (-1 if target.met_by_fewer_experts else 1)),
        is_monotonic=result.is_monotonic,
        steps=tuple(steps.values()),
        frontier_points=tuple(points),
        run=run(policies[result.index]),
        vanilla=run(VANILLA),
    )


def check_target(evaluator: PolicyEvaluator, family: SearchFamily, target: Target) -> None:
    """Raises ConfigError or SpecError, before any measurement, if the search cannot succeed."""
    family.policies(evaluator.engine.model.spec.router)
    if target.kind == "drop" and not evaluator.prompt_set.is_graded:
        raise ConfigError("drop needs graded prompts: name a task instead of a prompt file")
    if target.kind in ("drop", "bits") and _has_two_thresholds(family):
        raise ConfigError(
            f"{family.name}: {target.spec.description} cannot select two thresholds; "
            f"fix one, such as {family.name}:protect=0.02"
        )


def find_frontier(
    evaluator: PolicyEvaluator, family: SearchFamily, target: Target
) -> list[FrontierPoint]:
    """MC-MoE's policies that just meet the target, one for each of ``PROTECT_VALUES``.

    After the frontier search of MoDES (arXiv 2511.15690). Experts fall with ``beta`` and rise with
    ``protect``, so each search starts at the ``beta`` of the previous one. Values without a policy
    that meets the target are skipped; raises the last error if none is left.
    """
    policy_of: dict[float, str] = {}
    last_error: CoterieError | None = None
    start, router = 0, evaluator.engine.model.spec.router
    for protect in PROTECT_VALUES:
        policies = family.with_fixed("protect", protect).policies(router)[start:]

        def measure(indices: Sequence[int], policies: Sequence[str] = policies) -> list[Estimate]:
            return evaluator.measure_on_trace(target.kind, [policies[index] for index in indices])

        search = BoundarySearch(batch_size=POLICIES_PER_PASS)
        try:
            index = search.find(target, len(policies), measure).index
        except CoterieError as error:
            last_error = error
            continue
        policy_of[protect] = policies[index]
        start += index
    if not policy_of and last_error is not None:
        raise last_error
    estimates = evaluator.estimate_on_trace(list(policy_of.values()), with_loss=True)
    return [
        FrontierPoint(protect, policy, estimate["experts"], estimate["loss"])
        for (protect, policy), estimate in zip(policy_of.items(), estimates, strict=True)
    ]


def best_point(points: Sequence[FrontierPoint], target: Target) -> FrontierPoint:
    """The point with the least loss if the target limits experts, else that with fewest experts."""
    if target.kind == "experts":
        return min(points, key=lambda point: point.loss.value)
    return min(points, key=lambda point: point.experts.value)


def measure_policies(
    evaluator: PolicyEvaluator, kind: TargetKind, policies: Sequence[str]
) -> list[Estimate]:
    if kind in TRACE_KINDS:
        return evaluator.measure_on_trace(kind, policies)
    if kind == "drop":
        vanilla = evaluator.run(VANILLA)
        return [evaluator.run(policy).drop_estimate(vanilla) for policy in policies]
    if kind == "bits":
        return [evaluator.bits_estimate(policy) for policy in policies]
    return [evaluator.run(policy).experts_estimate() for policy in policies]


def _has_two_thresholds(family: SearchFamily) -> bool:
    return family.name == "mc-moe" and not family.is_fixed("protect")


@dataclass(frozen=True)
class SearchResult:
    """The selected candidate, and all estimates in the order in which they were measured."""

    index: int
    estimates: Mapping[int, Estimate]
    is_monotonic: bool  # the estimates change in one direction, as a bisection assumes


@dataclass(frozen=True)
class BoundarySearch:
    """A bisection that measures ``batch_size`` points at a time, after ``initial_points``.

    Candidates are ordered: each one uses fewer experts than the one before it.
    """

    batch_size: int = 1
    initial_points: int = 1

    def find(self, target: Target, num_candidates: int, measure: MeasureCandidates) -> SearchResult:
        """The candidate that meets the target while its neighbor does not; both are measured.

        Of a target on experts, this is the first candidate that meets it. Of any other target, it
        is the last one before the first measured failure. The neighbor is missing only at the end
        of the list. Raises ConfigError with the reachable range if no candidate meets the target.
        """
        estimates: dict[int, Estimate] = {}

        def are_past_edge(indices: Sequence[int]) -> list[bool]:
            estimates.update(zip(indices, measure(indices), strict=True))
            return [
                target.is_met(estimates[index]) == target.met_by_fewer_experts for index in indices
            ]

        edge = self._find_edge(num_candidates, are_past_edge)
        index = edge if target.met_by_fewer_experts else edge - 1
        if not 0 <= index < num_candidates:
            for end in {0, num_candidates - 1} - set(estimates):
                are_past_edge([end])
            ends = [estimates[0], estimates[num_candidates - 1]]
            raise ConfigError(unreachable_message(target, ends))
        return SearchResult(index, estimates, is_monotonic(target, estimates))

    def _find_edge(
        self, num_candidates: int, are_past_edge: Callable[[Sequence[int]], list[bool]]
    ) -> int:
        """The first index past the edge, or ``num_candidates``.

        ``low`` is measured and before the edge (or -1). ``high`` is measured and past it (or
        ``num_candidates``).
        """
        low, high, count = -1, num_candidates, max(self.initial_points, self.batch_size)
        while high - low > 1:
            num_past, points = 0, evenly_spaced(low, high, count)
            for start in range(0, len(points), self.batch_size):
                indices = points[start : start + self.batch_size]
                for index, is_past in zip(indices, are_past_edge(indices), strict=True):
                    num_past = num_past + 1 if is_past else 0
                    high = min(high, index) if is_past else high
                    low = index if index < high else low
                if num_past >= MAX_PAST_EDGE:
                    break
            count = self.batch_size
        return high


def evenly_spaced(low: int, high: int, count: int) -> list[int]:
    """At most ``count`` integers strictly between two, in even steps."""
    count = min(count, high - low - 1)
    return [low + (high - low) * step // (count + 1) for step in range(1, count + 1)]


def is_monotonic(target: Target, estimates: Mapping[int, Estimate]) -> bool:
    """Whether experts and mass only fall, or loss and drop only rise, along the candidates."""
    values = [estimates[index].value for index in sorted(estimates)]
    decreases = target.kind in ("experts", "mass")
    return all(b <= a if decreases else b >= a for a, b in pairwise(values))


def unreachable_message(target: Target, estimates: Sequence[Estimate]) -> str:
    low, high = (VALUE_FORMAT.format(v) for v in sorted(estimate.value for estimate in estimates))
    confidence = " with its 95 % interval" if target.confident else ""
    return (
        f"no policy meets {target}{confidence}; "
        f"{target.spec.description} ranges from {low} to {high}"
    )
