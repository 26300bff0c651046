"""What the paper leaves open or out: who votes, with what, who is kept, how many; and chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coterie.evals.run import Arm
from coterie.study.arms import BETAS, FEW, Groups, by_beta
from coterie.study.chapter import Finding
from coterie.study.comparison import Comparison
from coterie.study.duel import claimed, duels, sentence
from coterie.study.tally import Arms, Tally

TAUS = (0.5, 0.7, 0.9)
TWO = (0.3, 0.5)

Found = Callable[[Arms], Sequence[Finding | str]]


def in_step(arms: Arms, first: str, second: str) -> list[tuple[Tally, Tally]]:
    """The two groups' arms of one size, pair by pair."""
    return list(zip(arms.groups[first], arms.groups[second], strict=True))


def against_first(claims: dict[str, str]) -> Found:
    """Findings that hold every other group against the first one, size by size.

    ``claims``: for groups of which the paper says that they are below the first.
    """

    def found(arms: Arms) -> list[Finding | str]:
        base, *others = arms.groups
        told: list[Finding | str] = []
        for label in others:
            if label in claims:
                pairs = [(other, one) for one, other in in_step(arms, base, label)]
                fought = duels(pairs)
                told.append(
                    claimed(claims[label], fought, second=base, first=label, at="at the same size")
                )
            else:
                told.append(spread_told(label, base, arms))
        return told

    return found


def spread_told(label: str, base: str, arms: Arms) -> str:
    """One group against another where nobody has claimed anything."""
    fought = duels(in_step(arms, base, label))
    signs = [duel.sign for duel in fought]
    widest = max(fought, key=lambda duel: abs(duel.change.difference))
    return (
        f"{label[:1].upper()}{label[1:]} against {base}: above in {signs.count(1)} of {len(signs)} "
        f"sizes, below in {signs.count(-1)}. {sentence(widest)}"
    )


def vote_groups(_: int) -> Groups:
    return {
        "own experts, by probability": by_beta("des-vote", TWO),
        "by combine weight": by_beta("des-vote", TWO, "vote=weight"),
        "counting one each": by_beta("uniform-vote", TWO),
        "for all experts": by_beta("des-vote", TWO, "vote=full"),
        "by the best score": by_beta("des-vote", TWO, "vote=max"),
    }


def voter_groups(_: int) -> Groups:
    return {
        "everybody votes": by_beta("des-vote"),
        "words vote": by_beta("des-vote", FEW, "voters=before-eos"),
        "masks vote": by_beta("des-vote", FEW, "voters=masked"),
        "the uncertain vote more": by_beta("des-vote", FEW, "voters=uncertain"),
    }


def protection_groups(_: int) -> Groups:
    return {
        "nothing kept": by_beta("des-vote"),
        "top-1 kept": by_beta("des-vote", FEW, "protect=top1"),
        "words vote": by_beta("des-vote", FEW, "voters=before-eos"),
        "words vote, top-1 kept": by_beta("des-vote", FEW, "voters=before-eos,protect=top1"),
    }


def protection_found(arms: Arms) -> list[Finding | str]:
    return [
        spread_told("top-1 kept", "nothing kept", arms),
        spread_told("words vote, top-1 kept", "words vote", arms),
    ]


def mass_groups(_: int) -> Groups:
    return {
        "a share of the experts": by_beta("des-vote", BETAS),
        "a share of the votes": [Arm(f"mass-vote:tau={tau}") for tau in TAUS],
    }


def mass_found(arms: Arms) -> list[Finding | str]:
    pairs = [(vote, mass) for mass, vote in arms.pairs]
    if not pairs:
        return ["The two ways to size a coreset were not met at equal experts on this model."]
    fought = duels(pairs)
    signs = [duel.sign for duel in fought]
    widest = max(fought, key=lambda duel: abs(duel.change.difference))
    return [
        "A coreset that holds a share of the votes (its size follows the block) against one of a "
        f"fixed size, at equal mean experts: above in {signs.count(1)} of {len(signs)}, below in "
        f"{signs.count(-1)}. {sentence(widest)}"
    ]


def control_groups(_: int) -> Groups:
    return {
        "elected": by_beta("des-vote"),
        "drawn by lot": by_beta("random"),
        "drawn by lot, top-1 kept": by_beta("random", FEW, "protect=top1"),
    }


CONTROL = Comparison(
    name="random-control",
    title="The control: a random coreset of the same size",
    question="Is it the election that keeps answers right, or would any shared set do?",
    caption="Right answers with an elected and with a random coreset, and with a random one that "
    "keeps every token's best expert.",
    groups=control_groups,
    found=against_first(
        {"drawn by lot": "An elected coreset is better than a random one of the same size."}
    ),
    looks="place",
)
VOTES = Comparison(
    name="votes",
    title="What a vote says: definitions compared",
    question="The paper's votes are router probabilities of a token's own experts. Do others do "
    "as well?",
    caption="Right answers of coresets elected by five definitions of a vote, at the same sizes.",
    groups=vote_groups,
    found=against_first(
        {"counting one each": "Votes by the router's probability are better than uniform ones."}
    ),
    looks="place",
)
VOTERS = Comparison(
    name="voters",
    title="Who votes",
    question="After the end of its text a block is filled up, and the fill votes too. What if only "
    "words vote, or only what is still masked?",
    caption="Right answers of DES-Vote by who votes, at the same sizes.",
    groups=voter_groups,
    found=against_first({}),
    looks="place",
)
PROTECTION = Comparison(
    name="protection",
    title="Every token's best expert kept",
    question="What if each voter's first choice is in the coreset before votes are counted?",
    caption="Right answers of DES-Vote with and without top-1 protection, at the same sizes.",
    groups=protection_groups,
    found=protection_found,
    looks="place",
)
MASS = Comparison(
    name="mass",
    title="A share of the votes against a share of the experts",
    question="Is it better to elect as many as hold a share of the votes, or always as many?",
    caption="Right answers with coresets sized by vote mass and by number; the pairs in the table "
    "are at equal mean experts.",
    groups=mass_groups,
    matched=lambda k: {"des-vote": mass_groups(k)["a share of the votes"]},
    found=mass_found,
    looks="place",
)
