"""Search for the boundary between policies that meet a target and those that do not.

Candidates are ordered: each one uses fewer experts than the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from coterie.errors import ConfigError
from coterie.lab.calibration.target import VALUE_FORMAT, Estimate, Target

MeasureCandidates = Callable[[Sequence[int]], Sequence[Estimate]]  # of ascending indices
MAX_PAST_EDGE = 2  # consecutive points past the edge that end a pass over evenly spaced points


@dataclass(frozen=True)
class SearchResult:
    """The selected candidate, and all estimates in the order in which they were measured."""

    index: int
    estimates: Mapping[int, Estimate]
    is_monotonic: bool  # the estimates change in one direction, as a bisection assumes


@dataclass(frozen=True)
class BoundarySearch:
    """A bisection that measures ``batch_size`` points at a time, after ``initial_points``."""

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
