"""Accuracy against experts for every policy (Fig. 1c), and the size of the coreset (Fig. 7a)."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.lab.evals.run import Variant
from coterie.lab.study.charts import pareto_front
from coterie.lab.study.comparison import PolicyComparison
from coterie.lab.study.experiment import ExperimentText, Finding, Table, judge
from coterie.lab.study.paired import (
    claim_finding,
    compare_pairs,
    comparison_sentence,
    comparison_table,
)
from coterie.lab.study.results import Pair, VariantResults
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
GUARDED = "DES-Vote, guarded"  # answer tokens vote, and each voter's best expert is protected
PROPORTIONAL, PRICED = "proportional vote", "priced vote"
# The paper's headline: 99 % of the accuracy with 55 % fewer experts.
MIN_RELATIVE_ACCURACY, MIN_EXPERT_REDUCTION = 0.99, 0.55
NO_ACCURACY = "Vanilla has no correct answer, so there is no accuracy to keep."


def all_policy_groups(k: int) -> VariantGroups:
    """Every policy over its range of sizes, for a model with ``k`` experts per token."""
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
    """Numbers of experts per token below the model's ``k``."""
    return [count for count in (1, 2, 3, 4, 6) if count < k]


def own_policy_groups() -> dict[str, list[Variant]]:
    """The policies that are this project's own."""
    return {
        PROPORTIONAL: beta_variants("proportional-vote", (0.1, 0.15, 0.2, 0.3)),
        PRICED: [Variant(f"priced-vote:price={price}") for price in (0.17, 0.07, 0.03)],
    }


def vote_rivals(k: int) -> RivalVariants:
    """The policies that DES-Vote is compared with at equal experts."""
    groups = all_policy_groups(k)
    smaller = [*groups[DES_SEQ][:3], *groups[TOP_K][: k // 2]]
    return {
        "des-vote": smaller + [v for label in ("NAEE", "MC-MoE", RANDOM) for v in groups[label]]
    }


def matched_pairs(results: VariantResults, label: str) -> list[Pair]:
    """(the other policy, DES-Vote) at equal experts, for one group."""
    return [(other, vote) for other, vote in results.pairs if other in results.groups[label]]


def accuracy_findings(results: VariantResults) -> list[Finding | str]:
    claims = (
        ("An elected coreset is better than a random one of the same size.",
         (RANDOM,), "the random coreset"),
        ("At equal experts, DES-Vote is more accurate than fewer experts for each token (top-k).",
         (TOP_K,), TOP_K),
        ("At equal experts, DES-Vote is more accurate than dropping unlikely experts (NAEE, "
         "MC-MoE).", ("NAEE", "MC-MoE"), "NAEE or MC-MoE"),
        ("At equal experts, DES-Vote is more accurate than DES-Seq.", (DES_SEQ,), DES_SEQ),
    )  # fmt: skip
    return [
        *(
            claim_finding(
                claim,
                compare_pairs(pair for label in labels for pair in matched_pairs(results, label)),
                second=DES_VOTE,
                first=first,
            )
            for claim, labels, first in claims
        ),
        headline_finding(results, [DES_VOTE, DES_SEQ]),
        guarded_sentence(results),
        pareto_sentence(results),
    ]


def headline_finding(results: VariantResults, labels: Sequence[str]) -> Finding:
    """The smallest DES policy that keeps 99 % of the accuracy, against 55 % fewer experts."""
    vanilla = results.vanilla
    variants = [result for label in labels for result in results.groups[label]]
    accurate = [r for r in variants if r.accuracy >= MIN_RELATIVE_ACCURACY * vanilla.accuracy]
    claim = "DES uses at least 55 % fewer unique experts and keeps 99 % of vanilla's accuracy."
    if not vanilla.accuracy:
        return judge(NO_ACCURACY, claim, None)
    if not accurate:
        text = f"No DES policy in this run keeps {MIN_RELATIVE_ACCURACY:.0%} of vanilla's accuracy."
        return judge(text, claim, False)
    best = min(accurate, key=lambda result: result.experts)
    saved, (low, high) = 1 - best.experts / vanilla.experts, best.interval
    text = (
        f"The smallest DES policy that keeps {MIN_RELATIVE_ACCURACY:.0%} of vanilla's accuracy is "
        f"{best.name}: {best.accuracy:.1%} ({low:.1%} to {high:.1%}) with {best.experts:.1f} "
        f"experts, {saved:.0%} fewer than vanilla's {vanilla.experts:.1f}."
    )
    return judge(text, claim, saved > MIN_EXPERT_REDUCTION)


def guarded_sentence(results: VariantResults) -> str:
    by_policy = {result.policy: result for result in results.groups[DES_VOTE]}
    pairs = [(by_policy[r.policy.partition(",")[0]], r) for r in results.groups[GUARDED]]
    largest = max(compare_pairs(pairs), key=lambda comparison: comparison.change.difference)
    return (
        "Not in the paper: the guarded vote counts only answer tokens (not the fill after the "
        "end-of-text token) and protects each token's best expert. Its largest gain: "
        f"{comparison_sentence(largest)}"
    )


def pareto_sentence(results: VariantResults) -> str:
    front = pareto_front(results.all, lambda result: (result.experts, result.accuracy))
    text = ", ".join(f"{r.name} ({r.experts:.0f}, {r.accuracy:.1%})" for r in front)
    return f"The Pareto front (experts, accuracy): {text}."


def accuracy_tables(results: VariantResults) -> list[Table]:
    comparisons = compare_pairs(results.pairs)
    caption = "DES-Vote against other policies at equal experts."
    return [comparison_table(comparisons, caption)] if comparisons else []


def size_findings(results: VariantResults) -> list[Finding | str]:
    """How small the coreset can be."""
    votes, vanilla = results.groups[DES_VOTE], results.vanilla
    if not vanilla.accuracy:
        return [NO_ACCURACY]
    comparisons = {c.second.name: c for c in compare_pairs([(vanilla, vote) for vote in votes])}
    findings: list[Finding | str] = []
    small = next((vote for vote in votes if "beta=0.15" in vote.name), None)
    if small is not None:
        relative = small.accuracy / vanilla.accuracy
        text = (
            f"{comparison_sentence(comparisons[small.name])} It keeps {relative:.1%} of vanilla's "
            "accuracy."
        )
        claim = (
            "A coreset of 15 % of the experts keeps nearly all accuracy (the paper's setting for "
            "256 experts)."
        )
        findings.append(judge(text, claim, relative >= MIN_RELATIVE_ACCURACY))
    similar = [vote for vote in votes if comparisons[vote.name].sign == 0]
    smallest = min(similar, key=lambda vote: vote.experts, default=None)
    if smallest is None:
        return [*findings, "Every size in this run is significantly less accurate than vanilla."]
    return [
        *findings,
        f"The smallest coreset without a significant difference to vanilla is {smallest.name}: an "
        f"accuracy of {smallest.accuracy:.1%} against {vanilla.accuracy:.1%}.",
    ]


ACCURACY = PolicyComparison(
    text=ExperimentText.load("accuracy"),
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
    text=ExperimentText.load("coreset-size"),
    groups=lambda _: {
        DES_VOTE: beta_variants("des-vote", ALL_BETAS),
        RANDOM: beta_variants("random", MAIN_BETAS),
    },
    make_findings=size_findings,
)
