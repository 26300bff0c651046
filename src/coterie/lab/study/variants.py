"""Policies that the accuracy experiments compare, their sizes, and how they are run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    pairs: list[Pair] = []
    for family, templates in rivals.items():
        others = [results[rival.name] for rival in expand_policies(templates, k)]
        pairs += match_sizes(context, results, others, family, (share, 1.0))
    return VariantResults(
        experts=spec.router.experts,
        k=k,
        block=context.engine.generation.block,
        by_name={**results, **{result.name: result for result in extra}},
        groups={label: [results[v.name] for v in group] for label, group in variants.items()},
        pairs=pairs,
    )


def match_sizes(
    context: StudyContext,
    results: dict[str, VariantResult],
    others: Sequence[VariantResult],
    family: str,
    progress_span: tuple[float, float],
) -> list[Pair]:
    """(other, vote) for each result with a vote within ``MAX_EXPERT_DIFFERENCE``, the nearest.

    Two rounds: the first interpolates the size from known ``results``, the second corrects it. The
    votes that they measure are added to ``results``.
    """
    total = context.engine.model.spec.router.experts

    def votes() -> list[VariantResult]:
        """Results of the plain vote, which has no option but its size."""
        prefix = f"{family}:beta="
        return [r for name, r in results.items() if name == f"{prefix}{beta_text(r.policy)}"]

    def nearest(other: VariantResult) -> VariantResult | None:
        distances = [(abs(vote.experts - other.experts), vote) for vote in votes()]
        near = [pair for pair in distances if pair[0] <= MAX_EXPERT_DIFFERENCE]
        return min(near, key=lambda pair: pair[0], default=(0.0, None))[1]

    first, last = progress_span
    middle = first + 0.6 * (last - first)
    for span in ((first, middle), (middle, last)):
        sizes = [(vote.experts, coreset_size(vote.policy, total)) for vote in votes()]
        ends, counts = zip(*sorted([(0.0, 0), *sizes, (float(total), total)]), strict=True)
        unmatched = [other.experts for other in others if nearest(other) is None]
        missing = {max(1, round(count)) for count in np.interp(unmatched, ends, counts).tolist()}
        variants = [vote_of_size(size, total, family) for size in sorted(missing)]
        if new_variants := [variant for variant in variants if variant.name not in results]:
            results.update({r.name: r for r in context.evaluate(new_variants, span)})
    matches = [(other, nearest(other)) for other in others]
    return [(other, vote) for other, vote in matches if vote is not None]
