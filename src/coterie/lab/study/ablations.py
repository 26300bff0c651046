"""Ablations by accuracy: vote definitions, voters, protection, coreset size, and own policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from coterie.lab.evals.run import Variant
from coterie.lab.study.accuracy import (
    DES_SEQ,
    DES_VOTE,
    GUARDED,
    PRICED,
    PROPORTIONAL,
    all_policy_groups,
    matched_pairs,
)
from coterie.lab.study.comparison import PolicyComparison
from coterie.lab.study.experiment import ExperimentText, Finding, Table
from coterie.lab.study.paired import (
    PairedComparison,
    claim_finding,
    compare_pairs,
    comparison_table,
    count_sentence,
)
from coterie.lab.study.results import VariantResults
from coterie.lab.study.variants import (
    ALL_BETAS,
    MAIN_BETAS,
    RivalVariants,
    VariantGroups,
    beta_text,
    beta_variants,
)

TWO_BETAS = (0.3, 0.5)
ANSWER_TOKENS = "voters=before-eos"


def des_votes(options: str = "", betas: Sequence[float] = MAIN_BETAS) -> list[Variant]:
    return beta_variants("des-vote", betas, options)


def compare_groups(results: VariantResults, first: str, second: str) -> list[PairedComparison]:
    """``second`` against ``first``, size by size."""
    return compare_pairs(zip(results.groups[first], results.groups[second], strict=True))


def findings_against_first(
    claims: Mapping[str, str],
) -> Callable[[VariantResults], Sequence[Finding | str]]:
    """Compare every group with the first one. ``claims``: that the first is better than a group."""

    def make_findings(results: VariantResults) -> list[Finding | str]:
        base, *others = results.groups
        condition = "at the same size"
        return [
            claim_finding(
                claims[label],
                compare_groups(results, label, base),
                second=base,
                first=label,
                condition=condition,
            )
            if label in claims
            else group_sentence(results, base, label)
            for label in others
        ]

    return make_findings


def group_sentence(results: VariantResults, base: str, label: str) -> str:
    title = f"{label[:1].upper()}{label[1:]} against {base}"
    return count_sentence(title, compare_groups(results, base, label), "sizes")


def protection_findings(results: VariantResults) -> list[Finding | str]:
    plain, protected, tokens, both = results.groups
    return [group_sentence(results, plain, protected), group_sentence(results, tokens, both)]


def mass_groups(_: int) -> VariantGroups:
    return {
        "share of experts": des_votes(betas=ALL_BETAS),
        "share of votes": [Variant(f"mass-vote:tau={tau}") for tau in (0.5, 0.7, 0.9)],
    }


def mass_findings(results: VariantResults) -> list[Finding | str]:
    if not results.pairs:
        return ["No two coresets had equal experts on this model, so the rules are not compared."]
    label = "A coreset sized by its share of the votes against one of a fixed size, at equal means"
    comparisons = compare_pairs([(vote, mass) for mass, vote in results.pairs])
    return [count_sentence(label, comparisons, "comparisons")]


def beyond_groups(k: int) -> VariantGroups:
    groups = all_policy_groups(k)
    return {label: groups[label] for label in (DES_VOTE, GUARDED, DES_SEQ, PROPORTIONAL, PRICED)}


def beyond_rivals(k: int) -> RivalVariants:
    """Own policies against DES-Vote, and DES-Seq against the own one, at equal experts."""
    groups = beyond_groups(k)
    return {
        "des-vote": [*groups[PROPORTIONAL], *groups[PRICED]],
        "proportional-vote": groups[DES_SEQ][:3],
    }


def beyond_findings(results: VariantResults) -> list[Finding | str]:
    proportional, priced = (
        compare_pairs((vote, own) for own, vote in matched_pairs(results, label))
        for label in (PROPORTIONAL, PRICED)
    )
    guarded = compare_pairs(
        (other, result)
        for other in results.groups[GUARDED]
        for result in results.groups[PROPORTIONAL]
        if beta_text(result.policy) == beta_text(other.policy)
    )
    claim = "Not in the paper: {} is more accurate than {}."
    by_seats, by_price = "allocating seats in proportion to votes", "electing experts at a price"
    equal = "at equal experts"
    return [
        claim_finding(
            claim.format(by_seats, f"DES-Vote {equal}"),
            proportional, second=PROPORTIONAL, first=DES_VOTE,
        ),
        claim_finding(
            claim.format(by_price, f"DES-Vote {equal}"), priced, second=PRICED, first=DES_VOTE
        ),
        claim_finding(
            claim.format(by_seats, f"DES-Seq {equal}"),
            compare_pairs(matched_pairs(results, DES_SEQ)), second=PROPORTIONAL, first=DES_SEQ,
        ),
        claim_finding(
            claim.format(
                by_seats,
                "the guarded DES-Vote of the same beta, which may use more experts (protected "
                "experts come first)",
            ),
            guarded, second=PROPORTIONAL, first="the guarded vote", condition="at the same beta",
        ),
        "The own policies were chosen on other samples of problems than these.",
    ]  # fmt: skip


def beyond_tables(results: VariantResults) -> list[Table]:
    """Every matched pair, the own policy first."""
    own = results.groups[PROPORTIONAL] + results.groups[PRICED]
    pairs = [(b, a) if a in own else (a, b) for a, b in results.pairs]
    caption = "Own policies against others at equal experts."
    return [comparison_table(compare_pairs(pairs), caption)] if pairs else []


CONTROL = PolicyComparison(
    text=ExperimentText.load("random-control"),
    groups=lambda _: {
        "elected": des_votes(),
        "random": beta_variants("random"),
        "random, top-1 protected": beta_variants("random", MAIN_BETAS, "protect=top1"),
    },
    make_findings=findings_against_first(
        {"random": "An elected coreset is better than a random one of the same size."}
    ),
    color_by="place",
)
VOTES = PolicyComparison(
    text=ExperimentText.load("votes"),
    groups=lambda _: {
        "probability of own experts": des_votes(betas=TWO_BETAS),
        "combine weight": des_votes("vote=weight", TWO_BETAS),
        "one vote for each own expert": beta_variants("uniform-vote", TWO_BETAS),
        "probability of all experts": des_votes("vote=full", TWO_BETAS),
        "best score": des_votes("vote=max", TWO_BETAS),
    },
    make_findings=findings_against_first(
        {"one vote for each own expert": "Votes by router probability beat uniform votes."}
    ),
    color_by="place",
)
VOTERS = PolicyComparison(
    text=ExperimentText.load("voters"),
    groups=lambda _: {
        "all positions vote": des_votes(),
        "answer tokens vote": des_votes(ANSWER_TOKENS),
        "masked positions vote": des_votes("voters=masked"),
        "uncertain positions vote more": des_votes("voters=uncertain"),
    },
    make_findings=findings_against_first({}),
    color_by="place",
)
PROTECTION = PolicyComparison(
    text=ExperimentText.load("protection"),
    groups=lambda _: {
        "no protection": des_votes(),
        "top-1 protected": des_votes("protect=top1"),
        "answer tokens vote": des_votes(ANSWER_TOKENS),
        "answer tokens vote, top-1 protected": des_votes(f"{ANSWER_TOKENS},protect=top1"),
    },
    make_findings=protection_findings,
    color_by="place",
)
MASS = PolicyComparison(
    text=ExperimentText.load("mass"),
    groups=mass_groups,
    rivals=lambda k: {"des-vote": mass_groups(k)["share of votes"]},
    make_findings=mass_findings,
    color_by="place",
)
BEYOND = PolicyComparison(
    text=ExperimentText.load("beyond"),
    groups=beyond_groups,
    rivals=beyond_rivals,
    make_findings=beyond_findings,
    show_pareto=True,
    make_tables=beyond_tables,
)
