"""Ablations by accuracy: vote definitions, voters, protection, coreset size, and own policies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from coterie.lab.evals.run import Variant
from coterie.lab.study.accuracy import (
    DES_SEQ,
    DES_VOTE,
    GUARDED,
    PRICED,
    PROPORTIONAL,
    all_policy_groups,
    tables_with_pairs,
)
from coterie.lab.study.comparison import (
    FindingsMaker,
    PolicyComparison,
    draw_by_position,
    draw_comparison,
)
from coterie.lab.study.experiment import ExperimentText, Finding
from coterie.lab.study.paired import claim_finding, count_sentence
from coterie.lab.study.results import Pair, VariantResults
from coterie.lab.study.variants import (
    ALL_BETAS,
    MAIN_BETAS,
    NO_RIVALS,
    RivalVariants,
    VariantGroups,
    beta_text,
    beta_variants,
)

TWO_BETAS = (0.3, 0.5)
ANSWER_TOKENS = "voters=before-eos"
VOTE_SHARES = [Variant(f"mass-vote:tau={tau}") for tau in (0.5, 0.7, 0.9)]


def des_votes(options: str = "", betas: Sequence[float] = MAIN_BETAS) -> list[Variant]:
    return beta_variants("des-vote", betas, options)


def ablation(
    name: str,
    groups: VariantGroups,
    make_findings: FindingsMaker,
    rivals: RivalVariants = NO_RIVALS,
) -> PolicyComparison:
    """The comparison of groups that do not depend on K, each in a style of its own."""
    text, charts = ExperimentText.load(name), {name: draw_by_position}
    return PolicyComparison(text, lambda _: groups, make_findings, lambda _: rivals, charts)


def findings_against_first(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    """Compare every group with the first one, size by size.

    A claim with the label of a group says that the first group is better.
    """
    base, *others = results.groups
    at = "at the same size"
    return [
        claim_finding(
            text.claim(label), size_pairs(results, label, base),
            second=base, first=label, condition=at,
        )
        if label in text.claims
        else group_sentence(results, base, label)
        for label in others
    ]  # fmt: skip


def group_sentence(results: VariantResults, base: str, label: str) -> str:
    title = f"{label[:1].upper()}{label[1:]} against {base}"
    return count_sentence(title, size_pairs(results, base, label), "sizes")


def size_pairs(results: VariantResults, first: str, second: str) -> list[Pair]:
    return list(zip(results.groups[first], results.groups[second], strict=True))


def protection_findings(_: ExperimentText, results: VariantResults) -> list[Finding | str]:
    plain, protected, tokens, both = results.groups
    return [group_sentence(results, plain, protected), group_sentence(results, tokens, both)]


def mass_findings(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    pairs = [(vote, mass) for mass, vote in results.pairs]
    if not pairs:
        return [text.sentence("no-pairs")]
    return [count_sentence(text.sentence("label"), pairs, "comparisons")]


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


def beyond_findings(text: ExperimentText, results: VariantResults) -> list[Finding | str]:
    def against_vote(label: str) -> list[Pair]:
        return [(vote, own) for own, vote in results.pairs_of(label)]

    seats, price, guarded = PROPORTIONAL, PRICED, "the guarded vote"
    same_beta = [
        (other, own)
        for other in results.groups[GUARDED]
        for own in results.groups[PROPORTIONAL]
        if beta_text(own.policy) == beta_text(other.policy)
    ]
    return [
        claim_finding(text.claim("seats"), against_vote(seats), second=seats, first=DES_VOTE),
        claim_finding(text.claim("price"), against_vote(price), second=price, first=DES_VOTE),
        claim_finding(
            text.claim("seats-des-seq"), results.pairs_of(DES_SEQ), second=seats, first=DES_SEQ
        ),
        claim_finding(
            text.claim("seats-guarded"), same_beta,
            second=seats, first=guarded, condition="at the same beta",
        ),
        text.sentence("samples"),
    ]  # fmt: skip


CONTROL = ablation(
    "random-control",
    {
        "elected": des_votes(),
        "random": beta_variants("random"),
        "random, top-1 protected": beta_variants("random", MAIN_BETAS, "protect=top1"),
    },
    findings_against_first,
)
VOTES = ablation(
    "votes",
    {
        "probability of own experts": des_votes(betas=TWO_BETAS),
        "combine weight": des_votes("vote=weight", TWO_BETAS),
        "one vote for each own expert": beta_variants("uniform-vote", TWO_BETAS),
        "probability of all experts": des_votes("vote=full", TWO_BETAS),
        "best score": des_votes("vote=max", TWO_BETAS),
    },
    findings_against_first,
)
VOTERS = ablation(
    "voters",
    {
        "all positions vote": des_votes(),
        "answer tokens vote": des_votes(ANSWER_TOKENS),
        "masked positions vote": des_votes("voters=masked"),
        "uncertain positions vote more": des_votes("voters=uncertain"),
    },
    findings_against_first,
)
PROTECTION = ablation(
    "protection",
    {
        "no protection": des_votes(),
        "top-1 protected": des_votes("protect=top1"),
        "answer tokens vote": des_votes(ANSWER_TOKENS),
        "answer tokens vote, top-1 protected": des_votes(f"{ANSWER_TOKENS},protect=top1"),
    },
    protection_findings,
)
MASS = ablation(
    "mass",
    {"share of experts": des_votes(betas=ALL_BETAS), "share of votes": VOTE_SHARES},
    mass_findings,
    rivals={"des-vote": VOTE_SHARES},
)
BEYOND = PolicyComparison(
    text=ExperimentText.load("beyond"),
    groups=beyond_groups,
    rivals=beyond_rivals,
    make_findings=beyond_findings,
    charts={"beyond": partial(draw_comparison, pareto=True)},
    make_tables=tables_with_pairs,
)
