"""Policies that the accuracy experiments compare, their sizes, and how they are run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coterie.lab.evals.run import Variant
from coterie.lab.study.context import StudyContext
from coterie.lab.study.results import Pair, VariantResult, VariantResults
from coterie.routing import format_policy, parse_policy

VANILLA = Variant("vanilla")
ALL_BETAS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)  # shares of a layer's experts
MAIN_BETAS = (0.15, 0.3, 0.5)  # sizes at which variants of a rule are compared
GUARD_OPTIONS = "voters=before-eos,protect=top1"
MAX_EXPERT_DIFFERENCE = 0.75  # two variants this close count as at equal experts

VariantGroups = Mapping[str, Sequence[Variant]]  # label of a line -> its variants, smallest first
# Family of a vote -> the variants that it is compared with at equal experts.
RivalVariants = Mapping[str, Sequence[Variant]]
NO_RIVALS: RivalVariants = {}


def beta_variants(
    family: str, betas: Iterable[float] = MAIN_BETAS, options: str = ""
) -> list[Variant]:
    """``family:beta=..`` at every size."""
    specs = (f"{family}:beta={beta}{options and ','}{options}" for beta in betas)
    return [Variant(format_policy(parse_policy(spec))) for spec in specs]


def count_variants(family: str, counts: Iterable[int]) -> list[Variant]:
    """``family:k=..`` for every count."""
    return [Variant(f"{family}:k={count}") for count in counts]


def short_name(policy: str) -> str:
    """A policy in a legend: "des-vote:beta=0.3, guarded"."""
    return policy.replace(f",{GUARD_OPTIONS}", ", guarded")


def vote_of_size(size: int, total: int, family: str = "des-vote") -> Variant:
    """The vote with a coreset of exactly ``size`` of ``total`` experts."""
    return beta_variants(family, [math.ceil(size / total * 10_000) / 10_000])[0]


def coreset_size(policy: str, total: int) -> int:
    """The number of experts in a coreset, from the policy's ``beta``."""
    return max(1, math.floor(float(beta_text(policy)) * total + 1e-9))


def beta_text(policy: str) -> str:
    """The ``beta`` of a policy as written: "0.15"."""
    return policy.partition("beta=")[2].partition(",")[0]


def run_comparison(
    context: StudyContext,
    groups: VariantGroups,
    *,
    rivals: RivalVariants = NO_RIVALS,
    extra: Sequence[VariantResult] = (),
) -> VariantResults:
    """Run vanilla and every variant of the groups; the groups include those of ``rivals``.

    ``extra`` are results measured elsewhere that the record includes.
    """
    share = 0.7 if rivals else 1.0
    variants = {v.name: v for v in (VANILLA, *(v for group in groups.values() for v in group))}
    results: dict[str, VariantResult] = {}
    add_results(context, results, list(variants.values()), (0.0, share))
    pairs = [
        pair
        for family, others in rivals.items()
        for pair in SizeMatcher(context, results, family).match(
            [results[variant.name] for variant in others], (share, 1.0)
        )
    ]
    spec = context.engine.model.spec
    return VariantResults(
        experts=spec.router.experts,
        k=spec.router.k,
        block=context.engine.generation.block,
        by_name={**results, **{result.name: result for result in extra}},
        groups={label: [results[v.name] for v in group] for label, group in groups.items()},
        pairs=pairs,
    )


def add_results(
    context: StudyContext,
    results: dict[str, VariantResult],
    variants: Sequence[Variant],
    progress_span: tuple[float, float],
) -> None:
    """Evaluate variants and add their results by name."""
    for eval_result in context.evaluate(variants, progress_span) if variants else ():
        results[eval_result.policy] = VariantResult.from_eval_result(eval_result)


@dataclass(frozen=True)
class SizeMatcher:
    """Finds the vote with the nearest number of experts for each given result."""

    context: StudyContext
    results: dict[str, VariantResult]  # grows
    family: str = "des-vote"

    def match(
        self, others: Sequence[VariantResult], progress_span: tuple[float, float]
    ) -> list[Pair]:
        """(other, vote) for each match within ``MAX_EXPERT_DIFFERENCE``.

        Two rounds: the first interpolates the size from known results, the second corrects it.
        """
        first, last = progress_span
        middle = first + 0.6 * (last - first)
        for span in ((first, middle), (middle, last)):
            unmatched = [other for other in others if self._nearest_vote(other) is None]
            sizes = {self._estimate_size(other.experts) for other in unmatched}
            variants = [vote_of_size(size, self._total, self.family) for size in sorted(sizes)]
            new_variants = [variant for variant in variants if variant.name not in self.results]
            add_results(self.context, self.results, new_variants, span)
        matches = [(other, self._nearest_vote(other)) for other in others]
        return [(other, vote) for other, vote in matches if vote is not None]

    @property
    def _total(self) -> int:
        return self.context.engine.model.spec.router.experts

    def _votes(self) -> list[VariantResult]:
        """Results of the plain vote, which has no option but its size."""
        prefix = f"{self.family}:beta="
        return [r for name, r in self.results.items() if name == f"{prefix}{beta_text(r.policy)}"]

    def _nearest_vote(self, other: VariantResult) -> VariantResult | None:
        def distance(vote: VariantResult) -> float:
            return abs(vote.experts - other.experts)

        near = [vote for vote in self._votes() if distance(vote) <= MAX_EXPERT_DIFFERENCE]
        return min(near, key=distance, default=None)

    def _estimate_size(self, experts: float) -> int:
        """The coreset size expected to use ``experts``, by linear interpolation."""
        total = self._total
        votes = [(vote.experts, coreset_size(vote.policy, total)) for vote in self._votes()]
        curve = sorted([(0.0, 0), *votes, (float(total), total)])
        index = max(1, min(bisect_left(curve, (experts, 0)), len(curve) - 1))
        (low, low_size), (high, high_size) = curve[index - 1], curve[index]
        slope = (high_size - low_size) / (high - low) if high > low else 1.0
        return max(1, min(total, round(low_size + (experts - low) * slope)))
