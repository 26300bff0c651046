"""What the paper leaves open or out: who votes, with what, who is kept, how many; and chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coterie.lab.evals.run import Variant
from coterie.lab.study.comparison import PolicyComparison
from coterie.lab.study.experiment import Finding
from coterie.lab.study.paired import claim_finding, compare_pairs, comparison_sentence
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import ALL_BETAS, MAIN_BETAS, VariantGroups, beta_variants

TAUS = (0.5, 0.7, 0.9)
TWO_BETAS = (0.3, 0.5)

MakeFindings = Callable[[VariantResults], Sequence[Finding | str]]


def pairs_by_size(
    results: VariantResults, first: str, second: str
) -> list[tuple[VariantResult, VariantResult]]:
    """The two groups' arms of one size, pair by pair."""
    return list(zip(results.groups[first], results.groups[second], strict=True))


def findings_against_first(claims: dict[str, str]) -> MakeFindings:
    """Findings that hold every other group against the first one, size by size.

    ``claims``: for groups of which the paper says that they are below the first.
    """

    def make_findings(results: VariantResults) -> list[Finding | str]:
        base, *others = results.groups
        findings: list[Finding | str] = []
        for label in others:
            if label in claims:
                pairs = [
                    (group_result, base_result)
                    for base_result, group_result in pairs_by_size(results, base, label)
                ]
                comparisons = compare_pairs(pairs)
                findings.append(
                    claim_finding(
                        claims[label],
                        comparisons,
                        second=base,
                        first=label,
                        condition="at the same size",
                    )
                )
            else:
                findings.append(group_sentence(label, base, results))
        return findings

    return make_findings


def group_sentence(label: str, base: str, results: VariantResults) -> str:
    """One group against another where nobody has claimed anything."""
    comparisons = compare_pairs(pairs_by_size(results, base, label))
    signs = [comparison.sign for comparison in comparisons]
    largest = max(comparisons, key=lambda duel: abs(duel.change.difference))
    return (
        f"{label[:1].upper()}{label[1:]} against {base}: above in {signs.count(1)} of {len(signs)} "
        f"sizes, below in {signs.count(-1)}. {comparison_sentence(largest)}"
    )


def vote_groups(_: int) -> VariantGroups:
    return {
        "own experts, by probability": beta_variants("des-vote", TWO_BETAS),
        "by combine weight": beta_variants("des-vote", TWO_BETAS, "vote=weight"),
        "counting one each": beta_variants("uniform-vote", TWO_BETAS),
        "for all experts": beta_variants("des-vote", TWO_BETAS, "vote=full"),
        "by the best score": beta_variants("des-vote", TWO_BETAS, "vote=max"),
    }


def voter_groups(_: int) -> VariantGroups:
    return {
        "everybody votes": beta_variants("des-vote"),
        "words vote": beta_variants("des-vote", MAIN_BETAS, "voters=before-eos"),
        "masks vote": beta_variants("des-vote", MAIN_BETAS, "voters=masked"),
        "the uncertain vote more": beta_variants("des-vote", MAIN_BETAS, "voters=uncertain"),
    }


def protection_groups(_: int) -> VariantGroups:
    return {
        "nothing kept": beta_variants("des-vote"),
        "top-1 kept": beta_variants("des-vote", MAIN_BETAS, "protect=top1"),
        "words vote": beta_variants("des-vote", MAIN_BETAS, "voters=before-eos"),
        "words vote, top-1 kept": beta_variants(
            "des-vote", MAIN_BETAS, "voters=before-eos,protect=top1"
        ),
    }


def protection_findings(results: VariantResults) -> list[Finding | str]:
    return [
        group_sentence("top-1 kept", "nothing kept", results),
        group_sentence("words vote, top-1 kept", "words vote", results),
    ]


def mass_groups(_: int) -> VariantGroups:
    return {
        "a share of the experts": beta_variants("des-vote", ALL_BETAS),
        "a share of the votes": [Variant(f"mass-vote:tau={tau}") for tau in TAUS],
    }


def mass_findings(results: VariantResults) -> list[Finding | str]:
    pairs = [(vote, mass) for mass, vote in results.pairs]
    if not pairs:
        return ["The two ways to size a coreset were not met at equal experts on this model."]
    comparisons = compare_pairs(pairs)
    signs = [comparison.sign for comparison in comparisons]
    largest = max(comparisons, key=lambda duel: abs(duel.change.difference))
    return [
        "A coreset that holds a share of the votes (its size follows the block) against one of a "
        f"fixed size, at equal mean experts: above in {signs.count(1)} of {len(signs)}, below in "
        f"{signs.count(-1)}. {comparison_sentence(largest)}"
    ]


def control_groups(_: int) -> VariantGroups:
    return {
        "elected": beta_variants("des-vote"),
        "drawn by lot": beta_variants("random"),
        "drawn by lot, top-1 kept": beta_variants("random", MAIN_BETAS, "protect=top1"),
    }


CONTROL = PolicyComparison(
    name="random-control",
    title="The control: a random coreset of the same size",
    question="Is it the election that keeps answers right, or would any shared set do?",
    caption="Right answers with an elected and with a random coreset, and with a random one that "
    "keeps every token's best expert.",
    groups=control_groups,
    make_findings=findings_against_first(
        {"drawn by lot": "An elected coreset is better than a random one of the same size."}
    ),
    color_by="place",
)
VOTES = PolicyComparison(
    name="votes",
    title="What a vote says: definitions compared",
    question="The paper's votes are router probabilities of a token's own experts. Do others do "
    "as well?",
    caption="Right answers of coresets elected by five definitions of a vote, at the same sizes.",
    groups=vote_groups,
    make_findings=findings_against_first(
        {"counting one each": "Votes by the router's probability are better than uniform ones."}
    ),
    color_by="place",
)
VOTERS = PolicyComparison(
    name="voters",
    title="Who votes",
    question="After the end of its text a block is filled up, and the fill votes too. What if only "
    "words vote, or only what is still masked?",
    caption="Right answers of DES-Vote by who votes, at the same sizes.",
    groups=voter_groups,
    make_findings=findings_against_first({}),
    color_by="place",
)
PROTECTION = PolicyComparison(
    name="protection",
    title="Every token's best expert kept",
    question="What if each voter's first choice is in the coreset before votes are counted?",
    caption="Right answers of DES-Vote with and without top-1 protection, at the same sizes.",
    groups=protection_groups,
    make_findings=protection_findings,
    color_by="place",
)
MASS = PolicyComparison(
    name="mass",
    title="A share of the votes against a share of the experts",
    question="Is it better to elect as many as hold a share of the votes, or always as many?",
    caption="Right answers with coresets sized by vote mass and by number; the pairs in the table "
    "are at equal mean experts.",
    groups=mass_groups,
    rivals=lambda k: {"des-vote": mass_groups(k)["a share of the votes"]},
    make_findings=mass_findings,
    color_by="place",
)
