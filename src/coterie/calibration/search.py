"""Search on a ladder: where a target begins, or ceases, to be met; with proof on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from coterie.calibration.target import Reading, Target
from coterie.naming import CoterieError

Measure = Callable[[Sequence[int]], Sequence[Reading]]  # rungs, gentlest first -> their readings
PATIENCE = 2  # rungs past the edge, in succession, after which a coarse look ends


@dataclass(frozen=True)
class Found:
    """The rung that was searched for, and every reading on the way, in the order taken."""

    rung: int
    readings: Mapping[int, Reading]
    ordered: bool  # each reading that was taken agrees with the ladder's order


@dataclass(frozen=True)
class Searcher:
    """How to look: ``together`` rungs a measurement; ``coarse`` rungs spread over it at first."""

    together: int = 1
    coarse: int = 1

    def find(self, target: Target, rungs: int, measure: Measure) -> Found:
        """The rung that meets the target while its neighbour does not; both are measured.

        Fewer experts: the gentlest rung that meets it. Any other target: the most thrifty rung
        that does, on the gentle side of the first rung seen to fail. That neighbour is missing
        only at the ladder's end. Raises CoterieError with the reachable range where no rung does.
        """
        taken: dict[int, Reading] = {}

        def past(asked: Sequence[int]) -> list[bool]:
            taken.update(zip(asked, measure(asked), strict=True))
            return [target.met(taken[rung]) == target.grows_with_thrift for rung in asked]

        edge = self._edge(rungs, past)
        rung = edge if target.grows_with_thrift else edge - 1
        if not 0 <= rung < rungs:
            for end in {0, rungs - 1} - set(taken):
                past([end])
            raise CoterieError(unreachable(target, [taken[0], taken[rungs - 1]]))
        return Found(rung, taken, in_order(target, taken))

    def _edge(self, rungs: int, past: Callable[[Sequence[int]], list[bool]]) -> int:
        """The first rung that is past the edge, ``rungs`` where none is.

        Between ``low``, measured and not past (or -1), and ``high``, measured and past (or the
        ladder's end), until nothing lies between.
        """
        low, high, width = -1, rungs, max(self.coarse, self.together)
        while high - low > 1:
            beyond = 0
            for asked in chunks(spread(low, high, width), self.together):
                for rung, is_past in zip(asked, past(asked), strict=True):
                    beyond = beyond + 1 if is_past else 0
                    high = min(high, rung) if is_past else high
                    low = rung if rung < high else low
                if beyond >= PATIENCE:
                    break
            width = self.together
        return high


def spread(low: int, high: int, width: int) -> list[int]:
    """At most ``width`` whole numbers strictly between two, in even steps."""
    inside = high - low - 1
    width = min(width, inside)
    return [low + (high - low) * step // (width + 1) for step in range(1, width + 1)]


def chunks(rungs: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rungs[start : start + size] for start in range(0, len(rungs), size)]


def in_order(target: Target, readings: Mapping[int, Reading]) -> bool:
    """Whether thrift moved every reading the way that a bisection takes for granted."""
    values = [readings[rung].value for rung in sorted(readings)]
    falls = target.kind in ("experts", "mass")
    return all(b <= a if falls else b >= a for a, b in pairwise(values))


def unreachable(target: Target, ends: Sequence[Reading]) -> str:
    """The one line that says what could have been asked for."""
    meaning = target.meaning
    low, high = sorted(reading.value for reading in ends)
    told = f"{meaning.told.format(low)} to {meaning.told.format(high)}"
    surely = " for sure" if target.sure else ""
    return f"no rung meets {target}{surely}: from one end to the other, {meaning.noun} goes {told}"
