"""Beyond the paper: rules of our own against DES-Vote, at equal experts."""

from __future__ import annotations

from coterie.lab.study.accuracy import (
    DES_SEQ,
    DES_VOTE,
    GUARDED,
    PRICED,
    PROPORTIONAL,
    all_policy_groups,
    matched_pairs,
    own_policy_groups,
)
from coterie.lab.study.comparison import PolicyComparison
from coterie.lab.study.experiment import Finding, Table
from coterie.lab.study.paired import claim_finding, compare_pairs, comparison_table
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import RivalVariants, VariantGroups


def beyond_groups(k: int) -> VariantGroups:
    rivals = all_policy_groups(k)
    return {label: rivals[label] for label in (DES_VOTE, GUARDED, DES_SEQ, PROPORTIONAL, PRICED)}


def beyond_rivals(k: int) -> RivalVariants:
    """Ours against DES-Vote, and DES-Seq against ours, at equal experts."""
    rivals = beyond_groups(k)
    return {
        "des-vote": [*rivals[PROPORTIONAL], *rivals[PRICED]],
        "proportional-vote": rivals[DES_SEQ][:3],
    }


def beyond_findings(results: VariantResults) -> list[Finding | str]:
    """Whether a rule of ours is above DES-Vote, and above what else is good here."""
    comparisons = {
        label: compare_pairs((v, o) for o, v in matched_pairs(results, label))
        for label in own_policy_groups()
    }
    seq = compare_pairs(matched_pairs(results, DES_SEQ))
    guarded = compare_pairs(
        (other, result)
        for other in results.groups[GUARDED]
        for result in results.groups[PROPORTIONAL]
        if beta_of(result) == beta_of(other)
    )
    return [
        claim_finding(
            "Beyond the paper: seating experts in proportion beats DES-Vote at equal experts.",
            comparisons[PROPORTIONAL], second=PROPORTIONAL, first=DES_VOTE,
        ),
        claim_finding(
            "Beyond the paper: seating them while they are worth a price beats DES-Vote at equal "
            "experts.",
            comparisons[PRICED], second=PRICED, first=DES_VOTE,
        ),
        claim_finding(
            "Beyond the paper: seating experts in proportion beats DES-Seq at equal experts.",
            seq, second=PROPORTIONAL, first=DES_SEQ,
        ),
        claim_finding(
            "Beyond the paper: it beats the guarded DES-Vote of the same beta, which may hold more "
            "(protected experts come first).",
            guarded, second=PROPORTIONAL, first="the guarded vote", condition="at the same beta",
        ),
        "The rules were chosen on other draws of questions than these.",
    ]  # fmt: skip


def beta_of(result: VariantResult) -> str:
    """As spelled: "0.15"."""
    return result.policy.partition("beta=")[2].partition(",")[0]


def beyond_tables(results: VariantResults) -> list[Table]:
    """Every pair with ours second."""
    own_results = results.groups[PROPORTIONAL] + results.groups[PRICED]
    pairs = [(b, a) if a in own_results else (a, b) for a, b in results.pairs]
    return (
        [comparison_table(compare_pairs(pairs), "Ours against others at equal experts.")]
        if pairs
        else []
    )


BEYOND = PolicyComparison(
    name="beyond",
    title="Beyond the paper: seats in proportion",
    question="Can a rule without training beat DES-Vote at equal experts?",
    caption="Right answers of DES-Vote, of what mends it (guarded: only words vote, every voter's "
    "best expert is kept), and of votes that seat experts one by one, where a token weighs less "
    "the more of its vote is seated; with 95 % Wilson intervals.",
    groups=beyond_groups,
    rivals=beyond_rivals,
    make_findings=beyond_findings,
    show_pareto=True,
    make_tables=beyond_tables,
)
