"""Accuracy against experts for every policy (Fig. 1c), and the size of the coreset (Fig. 7a)."""

from __future__ import annotations

from functools import partial

from coterie.lab.evals.run import Variant
from coterie.lab.study.charts import pareto_front
from coterie.lab.study.comparison import PolicyComparison, draw_comparison, variant_table
from coterie.lab.study.experiment import ExperimentText, Finding, Table, judge
from coterie.lab.study.paired import claim_finding, compare_pairs, comparison_table
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
NAEE, MC_MOE = "NAEE", "MC-MoE"
GUARDED = "DES-Vote, guarded"  # answer tokens vote, and each voter's best expert is protected
PROPORTIONAL, PRICED = "proportional vote", "priced vote"
# The paper's headline: 99 % of the accuracy with 55 % fewer experts.
MIN_RELATIVE_ACCURACY, MIN_EXPERT_REDUCTION = 0.99, 0.55
NO_ACCURACY = "Vanilla has no correct answer, so there is no accuracy to keep."
RIVALS = {  # name in a finding, and key of the claim -> the groups that DES-Vote is compared with
    "the random coreset": (RANDOM,),
    TOP_K: (TOP_K,),
    "NAEE or MC-MoE": (NAEE, MC_MOE),
    DES_SEQ: (DES_SEQ,),
}


def all_policy_groups(k: int) -> VariantGroups:
    """Every policy over its range of sizes, for a model with ``k`` experts per token."""
    return {
        DES_VOTE: beta_variants("des-vote", ALL_BETAS),
        DES_SEQ: count_variants("des-seq", smaller_counts(k)),
        TOP_K: count_variants("topk", smaller_counts(k)),
        NAEE: beta_variants("naee", (0.4, 0.6)),
        MC_MOE: beta_variants("mc-moe", (0.4, 0.6)),
        "uniform vote": beta_variants("uniform-vote"),
        "XShare": beta_variants("xshare"),
        "mass vote": [Variant(f"mass-vote:tau={tau}") for tau in (0.5, 0.7, 0.9)],
        RANDOM: beta_variants("random"),
        GUARDED: beta_variants("des-vote", (0.15, 0.2, 0.3, 0.5), GUARD_OPTIONS),
        PROPORTIONAL: beta_variants("proportional-vote", (0.1, 0.15, 0.2, 0.3)),
        PRICED: [Variant(f"priced-vote:price={price}") for price in (0.17, 0.07, 0.03)],
    }


def smaller_counts(k: int) -> list[int]:
    """Numbers of experts per token below the model's ``k``."""
    return [count for count in (1, 2, 3, 4, 6) if count < k]


def vote_rivals(k: int) -> RivalVariants:
    """The policies that DES-Vote is compared with at equal experts."""
    groups = all_policy_groups(k)
    smaller = [*groups[DES_SEQ][:3], *groups[TOP_K][: k // 2]]
    return {"des-vote": smaller + [v for label in (NAEE, MC_MOE, RANDOM) for v in groups[label]]}


def accuracy_findings(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    plain = {result.policy: result for result in results.groups[DES_VOTE]}
    guarded = [(plain[r.policy.partition(",")[0]], r) for r in results.groups[GUARDED]]
    gain = max(compare_pairs(guarded), key=lambda comparison: comparison.change.difference)
    front = pareto_front(results.all, lambda result: (result.experts, result.accuracy))
    points = ", ".join(f"{r.name} ({r.experts:.0f}, {r.accuracy:.1%})" for r in front)
    return [
        *(
            claim_finding(
                text.claim(rival), results.pairs_of(*labels), second=DES_VOTE, first=rival
            )
            for rival, labels in RIVALS.items()
        ),
        headline_finding(text, results),
        text.sentence("guarded", gain=gain),
        text.sentence("front", points=points),
    ]


def headline_finding(text: ExperimentText, results: VariantResults) -> Finding:
    """The smallest DES policy that keeps 99 % of the accuracy, against 55 % fewer experts."""
    vanilla, best = results.vanilla, smallest_accurate(results)
    if not vanilla.accuracy:
        return judge(NO_ACCURACY, text.claim("headline"), None)
    if best is None:
        none = text.sentence("none-accurate", kept=MIN_RELATIVE_ACCURACY)
        return judge(none, text.claim("headline"), False)
    saved = 1 - best.experts / vanilla.experts
    return text.finding(
        "headline",
        saved > MIN_EXPERT_REDUCTION,
        kept=MIN_RELATIVE_ACCURACY,
        best=best,
        saved=saved,
        vanilla=vanilla,
    )


def smallest_accurate(results: VariantResults) -> VariantResult | None:
    """The DES policy with the fewest experts that keeps 99 % of vanilla's accuracy."""
    least = MIN_RELATIVE_ACCURACY * results.vanilla.accuracy
    variants = [*results.groups[DES_VOTE], *results.groups[DES_SEQ]]
    accurate = [result for result in variants if result.accuracy >= least]
    return min(accurate, key=lambda result: result.experts, default=None)


def tables_with_pairs(text: ExperimentText, results: VariantResults) -> list[Table]:
    """Every policy, and every matched pair, an own policy first."""
    own = results.groups[PROPORTIONAL] + results.groups[PRICED]
    pairs = [(b, a) if a in own else (a, b) for a, b in results.pairs]
    return [
        variant_table(results),
        *([comparison_table(pairs, text.caption("pairs"))] if pairs else []),
    ]


def size_findings(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    """How small the coreset can be."""
    votes, vanilla = results.groups[DES_VOTE], results.vanilla
    if not vanilla.accuracy:
        return [NO_ACCURACY]
    comparisons = {c.second.name: c for c in compare_pairs([(vanilla, vote) for vote in votes])}
    findings: list[Finding | str] = []
    for small in (vote for vote in votes if "beta=0.15" in vote.name):
        relative = small.accuracy / vanilla.accuracy
        holds, comparison = relative >= MIN_RELATIVE_ACCURACY, comparisons[small.name]
        findings.append(text.finding("small", holds, comparison=comparison, relative=relative))
    similar = [vote for vote in votes if comparisons[vote.name].sign == 0]
    if not similar:
        return [*findings, text.sentence("none-similar")]
    smallest = min(similar, key=lambda vote: vote.experts)
    return [*findings, text.sentence("smallest", smallest=smallest, vanilla=vanilla)]


FEW = (DES_VOTE, DES_SEQ, TOP_K, RANDOM, GUARDED, PROPORTIONAL)
ACCURACY = PolicyComparison(
    text=ExperimentText.load("accuracy"),
    groups=all_policy_groups,
    rivals=vote_rivals,
    make_findings=accuracy_findings,
    charts={
        "accuracy": partial(draw_comparison, pareto=True),
        "accuracy-few": partial(draw_comparison, labels=FEW, pareto=True),
    },
    make_tables=tables_with_pairs,
)
CORESET_SIZE = PolicyComparison(
    text=ExperimentText.load("coreset-size"),
    groups=lambda _: {
        DES_VOTE: beta_variants("des-vote", ALL_BETAS),
        RANDOM: beta_variants("random", MAIN_BETAS),
    },
    make_findings=size_findings,
    charts={"coreset-size": draw_comparison},
)
