"""Search on a ladder: where a target begins, or ceases, to be met; with proof on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from coterie.errors import CoterieError
from coterie.lab.calibration.target import Estimate, Target

MeasureCandidates = Callable[
    [Sequence[int]], Sequence[Estimate]
]  # rungs, gentlest first -> their readings
MAX_PAST_EDGE = 2  # rungs past the edge, in succession, after which a coarse look ends


@dataclass(frozen=True)
class SearchResult:
    """The rung that was searched for, and every reading on the way, in the order taken."""

    index: int
    estimates: Mapping[int, Estimate]
    is_monotonic: bool  # each reading that was taken agrees with the ladder's order


@dataclass(frozen=True)
class BoundarySearch:
    """How to look: ``together`` rungs a measurement; ``coarse`` rungs spread over it at first."""

    batch_size: int = 1
    initial_points: int = 1

    def find(self, target: Target, num_candidates: int, measure: MeasureCandidates) -> SearchResult:
        """The rung that meets the target while its neighbour does not; both are measured.

        Fewer experts: the gentlest rung that meets it. Any other target: the most thrifty rung
        that does, on the gentle side of the first rung seen to fail. That neighbour is missing
        only at the ladder's end. Raises CoterieError with the reachable range where no rung does.
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
            raise CoterieError(
                unreachable_message(target, [estimates[0], estimates[num_candidates - 1]])
            )
        return SearchResult(index, estimates, is_monotonic(target, estimates))

    def _find_edge(
        self, num_candidates: int, are_past_edge: Callable[[Sequence[int]], list[bool]]
    ) -> int:
        """The first rung that is past the edge, ``rungs`` where none is.

        Between ``low``, measured and not past (or -1), and ``high``, measured and past (or the
        ladder's end), until nothing lies between.
        """
        low, high, width = -1, num_candidates, max(self.initial_points, self.batch_size)
        while high - low > 1:
            num_past = 0
            for indices in chunks(evenly_spaced(low, high, width), self.batch_size):
                for index, is_past in zip(indices, are_past_edge(indices), strict=True):
                    num_past = num_past + 1 if is_past else 0
                    high = min(high, index) if is_past else high
                    low = index if index < high else low
                if num_past >= MAX_PAST_EDGE:
                    break
            width = self.batch_size
        return high


def evenly_spaced(low: int, high: int, count: int) -> list[int]:
    """At most ``width`` whole numbers strictly between two, in even steps."""
    available = high - low - 1
    count = min(count, available)
    return [low + (high - low) * step // (count + 1) for step in range(1, count + 1)]


def chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def is_monotonic(target: Target, estimates: Mapping[int, Estimate]) -> bool:
    """Whether thrift moved every reading the way that a bisection takes for granted."""
    values = [estimates[index].value for index in sorted(estimates)]
    decreases = target.kind in ("experts", "mass")
    return all(b <= a if decreases else b >= a for a, b in pairwise(values))


def unreachable_message(target: Target, estimates: Sequence[Estimate]) -> str:
    """The one line that says what could have been asked for."""
    spec = target.spec
    low, high = sorted(estimate.value for estimate in estimates)
    value_range = f"{spec.value_format.format(low)} to {spec.value_format.format(high)}"
    confidence = " for sure" if target.confident else ""
    return f"no rung meets {target}{confidence}: from one end to the other, {spec.description} goes {value_range}"
