"""Which policies the accuracy chapters compare, at which sizes, and how they are run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from coterie.evals.run import Arm
from coterie.routing import parse_policy, spell
from coterie.study.chapter import Facts
from coterie.study.lab import Lab
from coterie.study.tally import ArmsFacts, Tally

VANILLA = Arm("vanilla")
BETAS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)  # shares of a layer's experts
FEW = (0.15, 0.3, 0.5)  # where variants of a rule are compared
GUARD = "voters=before-eos,protect=top1"
NEAR = 0.75  # experts: two arms this close are at equal experts

Groups = Mapping[str, Sequence[Arm]]  # what a line is called -> its arms, smallest first
Matched = Mapping[str, Sequence[Arm]]  # a family of votes -> what it is met with at equal experts
NOTHING: Matched = {}


def by_beta(family: str, betas: Iterable[float] = FEW, options: str = "") -> list[Arm]:
    """``family:beta=..`` at every size."""
    rest = f",{options}" if options else ""
    return [Arm(spell(parse_policy(f"{family}:beta={beta}{rest}"))) for beta in betas]


def by_count(family: str, counts: Iterable[int]) -> list[Arm]:
    """``family:k=..``"""
    return [Arm(f"{family}:k={count}") for count in counts]


def vote_of_size(size: int, total: int, family: str = "des-vote") -> Arm:
    """A vote that elects exactly so many experts."""
    return by_beta(family, [math.ceil(size / total * 10_000) / 10_000])[0]


def size_of(policy: str, total: int) -> int:
    """The experts of a coreset that ``beta`` spells."""
    beta = policy.partition("beta=")[2].partition(",")[0]
    return max(1, math.floor(float(beta) * total + 1e-9))


def compare(
    lab: Lab, groups: Groups, *, matched: Matched = NOTHING, extra: Sequence[Tally] = ()
) -> Facts:
    """Runs vanilla and every arm of the groups, which those of ``matched`` are among. ``extra``
    are tallies made elsewhere."""
    share = 0.7 if matched else 1.0
    every = [VANILLA, *(arm for of in groups.values() for arm in of)]
    arms = list({arm.name: arm for arm in every}.values())
    known = {sheet.policy: Tally.of_sheet(sheet) for sheet in lab.sheets(arms, (0.0, share))}
    pairs = [
        pair
        for family, arms in matched.items()
        for pair in Matching(lab, known, family).pairs([known[a.name] for a in arms], (share, 1.0))
    ]
    vanilla, spec = known[VANILLA.name], lab.engine.model.spec
    found = ArmsFacts(
        experts=spec.router.experts,
        k=spec.router.k,
        block=lab.engine.generation.block,
        arms=[tally.document(vanilla) for tally in (*known.values(), *extra)],
        groups={label: [arm.name for arm in of] for label, of in groups.items()},
        pairs=pairs,
    )
    return cast("Facts", found)


@dataclass(frozen=True)
class Matching:
    """A vote at the experts of other arms: for each, the coreset that comes nearest to it."""

    lab: Lab
    known: dict[str, Tally]  # grows
    family: str = "des-vote"

    def pairs(self, others: Sequence[Tally], part: tuple[float, float]) -> list[list[str]]:
        """(other's name, the vote's name) for each that is met within ``NEAR`` experts.

        Two rounds: what a coreset of m comes to is read off the arms that are known, measured, and
        once corrected.
        """
        first, last = part
        middle = first + 0.6 * (last - first)
        for span in ((first, middle), (middle, last)):
            sizes = {self._size(other.experts) for other in others if self._met(other) is None}
            arms = [self._vote(size) for size in sorted(sizes)]
            fresh = [arm for arm in arms if arm.name not in self.known]
            for sheet in self.lab.sheets(fresh, span) if fresh else ():
                self.known[sheet.policy] = Tally.of_sheet(sheet)
        met = [(other, self._met(other)) for other in others]
        return [[other.name, vote.name] for other, vote in met if vote is not None]

    @property
    def _total(self) -> int:
        return self.lab.engine.model.spec.router.experts

    def _vote(self, size: int) -> Arm:
        return vote_of_size(size, self._total, self.family)

    def _votes(self) -> list[Tally]:
        """The plain vote, at every size that was run."""
        sizes = (self._vote(size) for size in range(1, self._total + 1))
        exact = {arm.name for arm in (*sizes, *by_beta(self.family, BETAS))}
        return [tally for name, tally in self.known.items() if name in exact]

    def _met(self, other: Tally) -> Tally | None:
        best = min(self._votes(), key=lambda vote: abs(vote.experts - other.experts), default=None)
        near = best is not None and abs(best.experts - other.experts) <= NEAR
        return best if near else None

    def _size(self, experts: float) -> int:
        """Of the coreset that should come to so many experts, by the two nearest that are known."""
        votes = [(vote.experts, size_of(vote.policy, self._total)) for vote in self._votes()]
        curve = sorted([(0.0, 0), *votes, (float(self._total), self._total)])
        place = min(bisect_left(curve, (experts, 0)), len(curve) - 1)
        (low, least), (high, most) = curve[max(place, 1) - 1], curve[max(place, 1)]
        slope = (most - least) / (high - low) if high > low else 1.0
        return max(1, min(self._total, round(least + (experts - low) * slope)))
