"""Which policies the accuracy chapters compare, at which sizes, and how they are run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from coterie.lab.evals.run import Variant
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import ExperimentData
from coterie.lab.study.results import VariantResult, VariantsRecord
from coterie.routing import format_policy, parse_policy

VANILLA = Variant("vanilla")
ALL_BETAS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)  # shares of a layer's experts
MAIN_BETAS = (0.15, 0.3, 0.5)  # where variants of a rule are compared
GUARD_OPTIONS = "voters=before-eos,protect=top1"
MAX_EXPERT_DIFFERENCE = 0.75  # experts: two arms this close are at equal experts

VariantGroups = Mapping[str, Sequence[Variant]]  # what a line is called -> its arms, smallest first
RivalVariants = Mapping[
    str, Sequence[Variant]
]  # a family of votes -> what it is met with at equal experts
NO_RIVALS: RivalVariants = {}


def beta_variants(
    family: str, betas: Iterable[float] = MAIN_BETAS, options: str = ""
) -> list[Variant]:
    """``family:beta=..`` at every size."""
    rest = f",{options}" if options else ""
    return [Variant(format_policy(parse_policy(f"{family}:beta={beta}{rest}"))) for beta in betas]


def count_variants(family: str, counts: Iterable[int]) -> list[Variant]:
    """``family:k=..``"""
    return [Variant(f"{family}:k={count}") for count in counts]


def vote_of_size(size: int, total: int, family: str = "des-vote") -> Variant:
    """A vote that elects exactly so many experts."""
    return beta_variants(family, [math.ceil(size / total * 10_000) / 10_000])[0]


def coreset_size(policy: str, total: int) -> int:
    """The experts of a coreset that ``beta`` spells."""
    beta = policy.partition("beta=")[2].partition(",")[0]
    return max(1, math.floor(float(beta) * total + 1e-9))


def run_comparison(
    context: StudyContext,
    groups: VariantGroups,
    *,
    matched: RivalVariants = NO_RIVALS,
    extra: Sequence[VariantResult] = (),
) -> ExperimentData:
    """Runs vanilla and every arm of the groups, which those of ``matched`` are among. ``extra``
    are tallies made elsewhere."""
    share = 0.7 if matched else 1.0
    all_variants = [VANILLA, *(variant for group in groups.values() for variant in group)]
    variants = list({variant.name: variant for variant in all_variants}.values())
    results = {
        eval_result.policy: VariantResult.from_eval_result(eval_result)
        for eval_result in context.evaluate(variants, (0.0, share))
    }
    pairs = [
        pair
        for family, variants in matched.items()
        for pair in SizeMatcher(context, results, family).match(
            [results[a.name] for a in variants], (share, 1.0)
        )
    ]
    vanilla, spec = results[VANILLA.name], context.engine.model.spec
    record = VariantsRecord(
        experts=spec.router.experts,
        k=spec.router.k,
        block=context.engine.generation.block,
        arms=[result.to_json(vanilla) for result in (*results.values(), *extra)],
        groups={label: [variant.name for variant in group] for label, group in groups.items()},
        pairs=pairs,
    )
    return cast("ExperimentData", record)


@dataclass(frozen=True)
class SizeMatcher:
    """A vote at the experts of other arms: for each, the coreset that comes nearest to it."""

    lab: StudyContext
    results: dict[str, VariantResult]  # grows
    family: str = "des-vote"

    def match(
        self, others: Sequence[VariantResult], progress_span: tuple[float, float]
    ) -> list[list[str]]:
        """(other's name, the vote's name) for each that is met within ``NEAR`` experts.

        Two rounds: what a coreset of m comes to is read off the arms that are known, measured, and
        once corrected.
        """
        first, last = progress_span
        middle = first + 0.6 * (last - first)
        for step in ((first, middle), (middle, last)):
            sizes = {
                self._estimate_size(other.experts)
                for other in others
                if self._nearest_vote(other) is None
            }
            variants = [self._vote_variant(size) for size in sorted(sizes)]
            new_variants = [variant for variant in variants if variant.name not in self.results]
            for eval_result in self.lab.evaluate(new_variants, step) if new_variants else ():
                self.results[eval_result.policy] = VariantResult.from_eval_result(eval_result)
        matches = [(other, self._nearest_vote(other)) for other in others]
        return [[other.name, vote.name] for other, vote in matches if vote is not None]

    @property
    def _num_experts(self) -> int:
        return self.lab.engine.model.spec.router.experts

    def _vote_variant(self, size: int) -> Variant:
        return vote_of_size(size, self._num_experts, self.family)

    def _vote_results(self) -> list[VariantResult]:
        """The plain vote, at every size that was run."""
        sizes = (self._vote_variant(size) for size in range(1, self._num_experts + 1))
        exact = {variant.name for variant in (*sizes, *beta_variants(self.family, ALL_BETAS))}
        return [result for name, result in self.results.items() if name in exact]

    def _nearest_vote(self, other: VariantResult) -> VariantResult | None:
        nearest = min(
            self._vote_results(), key=lambda vote: abs(vote.experts - other.experts), default=None
        )
        is_near = (
            nearest is not None and abs(nearest.experts - other.experts) <= MAX_EXPERT_DIFFERENCE
        )
        return nearest if is_near else None

    def _estimate_size(self, experts: float) -> int:
        """Of the coreset that should come to so many experts, by the two nearest that are known."""
        votes = [
            (vote.experts, coreset_size(vote.policy, self._num_experts))
            for vote in self._vote_results()
        ]
        curve = sorted([(0.0, 0), *votes, (float(self._num_experts), self._num_experts)])
        index = min(bisect_left(curve, (experts, 0)), len(curve) - 1)
        (low, low_size), (high, high_size) = curve[max(index, 1) - 1], curve[max(index, 1)]
        slope = (high_size - low_size) / (high - low) if high > low else 1.0
        return max(1, min(self._num_experts, round(low_size + (experts - low) * slope)))
