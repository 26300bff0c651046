"""Policies that the accuracy experiments compare, their sizes, and how they are run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coterie.lab.evals.run import Variant
from coterie.lab.study.experiment import StudyContext
from coterie.lab.study.results import Pair, VariantResult, VariantResults
from coterie.routing import format_policy, parse_policy

VANILLA = Variant("vanilla")
GUARD_OPTIONS = "voters=before-eos,protect=top1"
MAX_EXPERT_DIFFERENCE = 0.75  # two variants this close count as at equal experts

Templates = str | Sequence[str]  # of policies, as in comparisons.toml
NO_RIVALS: Mapping[str, Templates] = {}


def expand_policies(templates: Templates, k: int) -> list[Variant]:
    """ "topk:k={1,2}" is two policies, and HALF is half of ``k``. Counts from ``k`` are omitted."""
    variants = []
    for template in [templates] if isinstance(templates, str) else templates:
        head, _, rest = template.replace("HALF", str(max(1, k // 2))).partition("{")
        values, _, tail = rest.partition("}")
        policies = [f"{head}{value}{tail}" for value in values.split(",")]
        counts = [policy.partition(":k=")[2] for policy in policies]
        usable = [p for p, n in zip(policies, counts, strict=True) if int(n or 0) < k]
        variants += [Variant(format_policy(parse_policy(policy))) for policy in usable]
    return variants


def short_name(policy: str) -> str:
    """A policy in a legend: "des-vote:beta=0.3, guarded"."""
    return policy.replace(f",{GUARD_OPTIONS}", ", guarded")


def vote_of_size(size: int, total: int, family: str = "des-vote") -> Variant:
    """The vote with a coreset of exactly ``size`` of ``total`` experts."""
    beta = math.ceil(size / total * 10_000) / 10_000
    return Variant(format_policy(parse_policy(f"{family}:beta={beta}")))


def coreset_size(policy: str, total: int) -> int:
    """The number of experts in a coreset, from the policy's ``beta``."""
    return max(1, math.floor(float(beta_text(policy)) * total + 1e-9))


def beta_text(policy: str) -> str:
    """The ``beta`` of a policy as written: "0.15"."""
    return policy.partition("beta=")[2].partition(",")[0]


def run_comparison(
    context: StudyContext,
    groups: Mapping[str, Templates],
    rivals: Mapping[str, Templates] = NO_RIVALS,
    *,
    extra: Sequence[VariantResult] = (),
) -> VariantResults:
    """Run vanilla, every policy of the groups, and votes with as many experts as the rivals use.

    ``rivals`` are by the family of that vote. ``extra`` are results measured elsewhere that the
    record includes.
    """
    spec, share = context.engine.model.spec, 0.7 if rivals else 1.0
    k = spec.router.k
    variants = {label: expand_policies(templates, k) for label, templates in groups.items()}
    by_name = {v.name: v for v in (VANILLA, *(v for group in variants.values() for v in group))}
    results = {r.name: r for r in context.evaluate(list(by_name.values()), (0.0, share))}
    pairs = [
        pair
        for family, templates in rivals.items()
        for pair in SizeMatcher(context, results, family).match(
            [results[rival.name] for rival in expand_policies(templates, k)], (share, 1.0)
        )
    ]
    return VariantResults(
        experts=spec.router.experts,
        k=k,
        block=context.engine.generation.block,
        by_name={**results, **{result.name: result for result in extra}},
        groups={label: [results[v.name] for v in group] for label, group in variants.items()},
        pairs=pairs,
    )


@dataclass(frozen=True)
class SizeMatcher:
    """Finds the vote with the nearest number of experts for each given result."""

    context: StudyContext
    results: dict[str, VariantResult]  # grows
    family: str = "des-vote"

    @property
    def _total(self) -> int:
        return self.context.engine.model.spec.router.experts

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
            if new_variants:
                self.results.update({r.name: r for r in self.context.evaluate(new_variants, span)})
        matches = [(other, self._nearest_vote(other)) for other in others]
        return [(other, vote) for other, vote in matches if vote is not None]

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
        ends, sizes = zip(*sorted([(0.0, 0), *votes, (float(total), total)]), strict=True)
        return max(1, round(float(np.interp(experts, ends, sizes))))
