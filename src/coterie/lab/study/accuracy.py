"""Accuracy against experts for every policy (Fig. 1c), and the tables and sizes behind it."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.lab.evals.run import Variant
from coterie.lab.study.comparison import PolicyComparison
from coterie.lab.study.curves import pareto_front
from coterie.lab.study.experiment import Finding, Table
from coterie.lab.study.paired import (
    claim_finding,
    compare_pairs,
    comparison_sentence,
    comparison_table,
)
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import (
    ALL_BETAS,
    GUARD_OPTIONS,
    MAIN_BETAS,
    RivalVariants,
    VariantGroups,
    beta_variants,
    count_variants,
)

DES_VOTE, DES_SEQ, TOP_K, RANDOM = "DES-Vote", "DES-Seq", "top-k", "random"
GUARDED = "DES-Vote, guarded"  # words vote, not fill; every voter's best expert is kept
PROPORTIONAL, PRICED = "proportional vote", "priced vote"
MIN_RELATIVE_ACCURACY, MIN_EXPERT_REDUCTION = (
    0.99,
    0.55,
)  # the paper's headline: of the accuracy, fewer experts


def all_policy_groups(k: int) -> VariantGroups:
    """Every rule over its range, for a model whose tokens use ``k`` experts."""
    return {
        DES_VOTE: beta_variants("des-vote", ALL_BETAS),
        DES_SEQ: count_variants("des-seq", smaller_counts(k)),
        TOP_K: count_variants("topk", smaller_counts(k)),
        "NAEE": beta_variants("naee", (0.4, 0.6)),
        "MC-MoE": beta_variants("mc-moe", (0.4, 0.6)),
        "uniform vote": beta_variants("uniform-vote"),
        "XShare": beta_variants("xshare"),
        "mass vote": [Variant(f"mass-vote:tau={tau}") for tau in (0.5, 0.7, 0.9)],
        RANDOM: beta_variants("random"),
        GUARDED: beta_variants("des-vote", (0.15, 0.2, 0.3, 0.5), GUARD_OPTIONS),
        **own_policy_groups(),
    }


def smaller_counts(k: int) -> list[int]:
    """Experts for each token, where the model uses ``k``."""
    return [count for count in (1, 2, 3, 4, 6) if count < k]


def own_policy_groups() -> dict[str, list[Variant]]:
    """The rules that no paper has."""
    return {
        PROPORTIONAL: beta_variants("proportional-vote", (0.1, 0.15, 0.2, 0.3)),
        PRICED: [Variant(f"priced-vote:price={price}") for price in (0.17, 0.07, 0.03)],
    }


def vote_rivals(k: int) -> RivalVariants:
    """What DES-Vote is held against at equal experts."""
    rivals = all_policy_groups(k)
    smaller = [*rivals[DES_SEQ][:3], *rivals[TOP_K][: k // 2]]
    return {
        "des-vote": smaller + [a for label in ("NAEE", "MC-MoE", RANDOM) for a in rivals[label]]
    }


def matched_pairs(results: VariantResults, label: str) -> list[tuple[VariantResult, VariantResult]]:
    """(the other, DES-Vote) at equal experts, for one group."""
    return [(other, vote) for other, vote in results.pairs if other in results.groups[label]]


def accuracy_findings(results: VariantResults) -> list[Finding | str]:
    """What the figure says of the paper's claims."""
    by_rival = {
        label: compare_pairs(matched_pairs(results, label)) for label in (RANDOM, TOP_K, DES_SEQ)
    }
    pruning = compare_pairs(matched_pairs(results, "NAEE") + matched_pairs(results, "MC-MoE"))
    return [
        claim_finding(
            "An elected coreset is better than a random one of the same size.",
            by_rival[RANDOM], second=DES_VOTE, first="the random coreset",
        ),
        claim_finding(
            "At equal experts, sharing by DES-Vote is more accurate than keeping fewer experts "
            "for each token (top-k).",
            by_rival[TOP_K], second=DES_VOTE, first=TOP_K,
        ),
        claim_finding(
            "At equal experts, DES-Vote is more accurate than dropping unlikely experts "
            "(NAEE, MC-MoE).",
            pruning, second=DES_VOTE, first="NAEE or MC-MoE",
        ),
        claim_finding(
            "At equal experts, DES-Vote is more accurate than DES-Seq.",
            by_rival[DES_SEQ], second=DES_VOTE, first=DES_SEQ,
        ),
        headline_finding(results, [DES_VOTE, DES_SEQ]),
        guarded_sentence(results),
        pareto_sentence(results),
    ]  # fmt: skip


def headline_finding(results: VariantResults, labels: Sequence[str]) -> Finding:
    """99 % of the accuracy with 55 % fewer experts: the smallest of DES that keeps so much."""
    variant_results = [result for label in labels for result in results.groups[label]]
    accurate = [
        t for t in variant_results if t.accuracy >= MIN_RELATIVE_ACCURACY * results.vanilla.accuracy
    ]
    claim = "DES cuts unique experts by over 55 % and keeps 99 % of vanilla's accuracy."
    if not results.vanilla.accuracy:
        text = "Vanilla itself answers nothing right: there is no accuracy to keep."
        return Finding(text, claim, "cannot be told here")
    if not accurate:
        text = (
            f"No DES policy that was run keeps {MIN_RELATIVE_ACCURACY:.0%} of vanilla's accuracy."
        )
        return Finding(text, claim, "does not hold")
    best = min(accurate, key=lambda tally: tally.experts)
    saved = 1 - best.experts / results.vanilla.experts
    low, high = best.accuracy_share().interval
    text = (
        f"The smallest DES policy that keeps {MIN_RELATIVE_ACCURACY:.0%} of vanilla's accuracy is {best.name}: "
        f"{best.accuracy:.1%} right ({low:.1%} to {high:.1%}) with {best.experts:.1f} experts, "
        f"{saved:.0%} fewer than vanilla's {results.vanilla.experts:.1f}."
    )
    return Finding(text, claim, "holds" if saved > MIN_EXPERT_REDUCTION else "does not hold")


def guarded_sentence(results: VariantResults) -> str:
    """Not a claim of the paper: who votes, and what is kept, at the same sizes."""
    by_policy = {result.policy: result for result in results.groups[DES_VOTE]}
    pairs = [(by_policy[t.policy.partition(",")[0]], t) for t in results.groups[GUARDED]]
    largest = max(compare_pairs(pairs), key=lambda duel: duel.change.difference)
    return (
        "Beyond the paper: letting only words vote (not the fill after the end of the text) and "
        f"keeping every token's best expert changes most where {comparison_sentence(largest)}"
    )


def pareto_sentence(results: VariantResults) -> str:
    front = pareto_front(
        [results.vanilla, *(t for group in results.groups.values() for t in group)]
    )
    text = ", ".join(f"{t.name} ({t.experts:.0f}, {t.accuracy:.1%})" for t in front)
    return f"Nobody beats these with as few experts (experts, right): {text}."


def accuracy_tables(results: VariantResults) -> list[Table]:
    comparisons = compare_pairs(results.pairs)
    return (
        [comparison_table(comparisons, "DES-Vote against others at equal experts.")]
        if comparisons
        else []
    )


def size_findings(results: VariantResults) -> list[Finding | str]:
    """How far the coreset can shrink."""
    votes, vanilla = results.groups[DES_VOTE], results.vanilla
    by_name = {
        comparison.second.name: comparison
        for comparison in compare_pairs([(vanilla, vote) for vote in votes])
    }
    indistinguishable = [vote for vote in votes if by_name[vote.name].sign == 0]
    smallest = min(indistinguishable, key=lambda vote: vote.experts, default=None)
    small = next((vote for vote in votes if "beta=0.15" in vote.name), None)
    findings: list[Finding | str] = []
    if not vanilla.accuracy:
        return ["Vanilla itself answers nothing right: there is no accuracy to keep."]
    if small is not None:
        relative = small.accuracy / vanilla.accuracy
        findings.append(
            Finding(
                f"{comparison_sentence(by_name[small.name])} It keeps {relative:.1%} of vanilla's accuracy.",
                "A coreset of 15 % of the experts keeps nearly all accuracy (the paper's setting "
                "for 256 experts).",
                "holds" if relative >= MIN_RELATIVE_ACCURACY else "does not hold",
            )
        )
    if smallest is None:
        return [*findings, "Every size that was run is below vanilla, beyond the interval."]
    return [
        *findings,
        f"The smallest coreset that cannot be told from vanilla is {smallest.name}: "
        f"{smallest.accuracy:.1%} right against {vanilla.accuracy:.1%}.",
    ]


ACCURACY = PolicyComparison(
    name="accuracy",
    title="Accuracy against experts (Fig. 1c)",
    question="What does each way of touching fewer experts cost in right answers?",
    caption="Right answers against unique experts, with 95 % Wilson intervals; each marker is one "
    "policy at one size. Dotted: vanilla's accuracy, and the Pareto front over all policies. "
    "Guarded: only words vote, not the fill after the end of the text, and every voter's best "
    "expert is kept.",
    figures={
        "accuracy": (),
        "accuracy-few": (DES_VOTE, DES_SEQ, TOP_K, RANDOM, GUARDED, PROPORTIONAL),
    },
    groups=all_policy_groups,
    rivals=vote_rivals,
    make_findings=accuracy_findings,
    show_pareto=True,
    make_tables=accuracy_tables,
)
CORESET_SIZE = PolicyComparison(
    name="coreset-size",
    title="The size of the coreset (Fig. 7a)",
    question="How small can the elected set become before answers go wrong?",
    caption="Right answers of DES-Vote and of a random coreset as the coreset grows, with 95 % "
    "Wilson intervals.",
    groups=lambda _: {
        DES_VOTE: beta_variants("des-vote", ALL_BETAS),
        RANDOM: beta_variants("random", MAIN_BETAS),
    },
    make_findings=size_findings,
)
