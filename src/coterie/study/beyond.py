"""Beyond the paper: rules of our own against DES-Vote, at equal experts."""

from __future__ import annotations

from coterie.study.accuracy import (
    GUARDED,
    PRICED,
    PROPORTIONAL,
    SEQ,
    VOTE,
    every_rule,
    matched_pairs,
    ours,
)
from coterie.study.arms import Groups, Matched
from coterie.study.chapter import Finding, Table
from coterie.study.comparison import Comparison
from coterie.study.duel import claimed, duel_table, duels
from coterie.study.tally import Arms, Tally


def beyond_groups(k: int) -> Groups:
    rivals = every_rule(k)
    return {label: rivals[label] for label in (VOTE, GUARDED, SEQ, PROPORTIONAL, PRICED)}


def beyond_matched(k: int) -> Matched:
    """Ours against DES-Vote, and DES-Seq against ours, at equal experts."""
    rivals = beyond_groups(k)
    return {
        "des-vote": [*rivals[PROPORTIONAL], *rivals[PRICED]],
        "proportional-vote": rivals[SEQ][:3],
    }


def beyond_findings(arms: Arms) -> list[Finding | str]:
    """Whether a rule of ours is above DES-Vote, and above what else is good here."""
    met = {label: duels((v, o) for o, v in matched_pairs(arms, label)) for label in ours()}
    seq = duels(matched_pairs(arms, SEQ))
    guarded = duels(
        (other, own)
        for other in arms.groups[GUARDED]
        for own in arms.groups[PROPORTIONAL]
        if beta_of(own) == beta_of(other)
    )
    return [
        claimed(
            "Beyond the paper: seating experts in proportion beats DES-Vote at equal experts.",
            met[PROPORTIONAL], second=PROPORTIONAL, first=VOTE,
        ),
        claimed(
            "Beyond the paper: seating them while they are worth a price beats DES-Vote at equal "
            "experts.",
            met[PRICED], second=PRICED, first=VOTE,
        ),
        claimed(
            "Beyond the paper: seating experts in proportion beats DES-Seq at equal experts.",
            seq, second=PROPORTIONAL, first=SEQ,
        ),
        claimed(
            "Beyond the paper: it beats the guarded DES-Vote of the same beta, which may hold more "
            "(protected experts come first).",
            guarded, second=PROPORTIONAL, first="the guarded vote", at="at the same beta",
        ),
        "The rules were chosen on other draws of questions than these.",
    ]  # fmt: skip


def beta_of(tally: Tally) -> str:
    """As spelled: "0.15"."""
    return tally.policy.partition("beta=")[2].partition(",")[0]


def beyond_tables(arms: Arms) -> list[Table]:
    """Every pair with ours second."""
    ours = arms.groups[PROPORTIONAL] + arms.groups[PRICED]
    told = [(b, a) if a in ours else (a, b) for a, b in arms.pairs]
    return [duel_table(duels(told), "Ours against others at equal experts.")] if told else []


BEYOND = Comparison(
    name="beyond",
    title="Beyond the paper: seats in proportion",
    question="Can a rule without training beat DES-Vote at equal experts?",
    caption="Right answers of DES-Vote, of what mends it (guarded: only words vote, every voter's "
    "best expert is kept), and of votes that seat experts one by one, where a token weighs less "
    "the more of its vote is seated; with 95 % Wilson intervals.",
    groups=beyond_groups,
    matched=beyond_matched,
    found=beyond_findings,
    front=True,
    tabulate=beyond_tables,
)
