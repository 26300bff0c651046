"""MC-MoE's two thresholds: the frontier of pairs that just meet a target, and its best point.

After the frontier search of MoDES (arXiv 2511.15690): the experts used fall with ``beta`` and rise
with ``protect``, so along a rising ``protect`` the ``beta`` that just meets a target never falls,
and each search begins where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.calibration.bench import TOGETHER, Bench, OnTrace
from coterie.calibration.ladder import Family
from coterie.calibration.search import Searcher
from coterie.calibration.target import Reading, Target
from coterie.naming import CoterieError

PROTECTED = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares of a window's tokens


@dataclass(frozen=True)
class Point:
    """One pair of the frontier, on vanilla's forwards: what it uses and what it loses."""

    policy: str
    protect: float
    experts: Reading
    loss: Reading


def frontier(bench: Bench, family: Family, target: Target) -> list[Point]:
    """For each of ``PROTECTED``, the policy that just meets the target on vanilla's forwards.

    Shares with which nothing meets it are left out; raises the CoterieError of the last where
    none is left.
    """
    found: dict[float, str] = {}
    refusal: CoterieError | None = None
    first = 0
    for protect in PROTECTED:
        ladder = family.fixing("protect", protect).ladder(bench.engine.model.spec.router)
        policies = [ladder.spelling(rung) for rung in range(first, len(ladder))]

        def measure(rungs: Sequence[int], policies: Sequence[str] = policies) -> list[Reading]:
            seen = bench.on_trace([policies[rung] for rung in rungs], losses=target.kind == "loss")
            return [one.reading(target.kind) for one in seen]

        try:
            rung = Searcher(together=TOGETHER).find(target, len(policies), measure).rung
        except CoterieError as error:
            refusal = error
            continue
        found[protect] = policies[rung]
        first += rung
    if not found and refusal is not None:
        raise refusal
    seen = bench.on_trace(list(found.values()), losses=True)
    return [
        _point(policy, protect, one)
        for (protect, policy), one in zip(found.items(), seen, strict=True)
    ]


def best(points: Sequence[Point], target: Target) -> Point:
    """Of pairs with as many experts the one that loses least; else the one with fewest experts."""
    if target.kind == "experts":
        return min(points, key=lambda point: point.loss.value)
    return min(points, key=lambda point: point.experts.value)


def _point(policy: str, protect: float, seen: OnTrace) -> Point:
    return Point(policy, protect, seen.reading("experts"), seen.reading("loss"))
