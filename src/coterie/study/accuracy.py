"""Accuracy against experts for every policy (Fig. 1c), and the tables and sizes behind it."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.evals.run import Arm
from coterie.study.arms import BETAS, FEW, GUARD, Groups, Matched, by_beta, by_count
from coterie.study.chapter import Finding, Table
from coterie.study.comparison import Comparison
from coterie.study.curves import pareto
from coterie.study.duel import claimed, duel_table, duels, sentence
from coterie.study.tally import Arms, Tally

VOTE, SEQ, TOP, LOT = "DES-Vote", "DES-Seq", "top-k", "random"
GUARDED = "DES-Vote, guarded"  # words vote, not fill; every voter's best expert is kept
PROPORTIONAL, PRICED = "proportional vote", "priced vote"
KEPT, FEWER = 0.99, 0.55  # the paper's headline: of the accuracy, fewer experts


def every_rule(k: int) -> Groups:
    """Every rule over its range, for a model whose tokens use ``k`` experts."""
    return {
        VOTE: by_beta("des-vote", BETAS),
        SEQ: by_count("des-seq", fewer(k)),
        TOP: by_count("topk", fewer(k)),
        "NAEE": by_beta("naee", (0.4, 0.6)),
        "MC-MoE": by_beta("mc-moe", (0.4, 0.6)),
        "uniform vote": by_beta("uniform-vote"),
        "XShare": by_beta("xshare"),
        "mass vote": [Arm(f"mass-vote:tau={tau}") for tau in (0.5, 0.7, 0.9)],
        LOT: by_beta("random"),
        GUARDED: by_beta("des-vote", (0.15, 0.2, 0.3, 0.5), GUARD),
        **ours(),
    }


def fewer(k: int) -> list[int]:
    """Experts for each token, where the model uses ``k``."""
    return [count for count in (1, 2, 3, 4, 6) if count < k]


def ours() -> dict[str, list[Arm]]:
    """The rules that no paper has."""
    return {
        PROPORTIONAL: by_beta("proportional-vote", (0.1, 0.15, 0.2, 0.3)),
        PRICED: [Arm(f"priced-vote:price={price}") for price in (0.17, 0.07, 0.03)],
    }


def met_by_vote(k: int) -> Matched:
    """What DES-Vote is held against at equal experts."""
    rivals = every_rule(k)
    few = [*rivals[SEQ][:3], *rivals[TOP][: k // 2]]
    return {"des-vote": few + [a for label in ("NAEE", "MC-MoE", LOT) for a in rivals[label]]}


def matched_pairs(arms: Arms, label: str) -> list[tuple[Tally, Tally]]:
    """(the other, DES-Vote) at equal experts, for one group."""
    return [(other, vote) for other, vote in arms.pairs if other in arms.groups[label]]


def main_findings(arms: Arms) -> list[Finding | str]:
    """What the figure says of the paper's claims."""
    against = {label: duels(matched_pairs(arms, label)) for label in (LOT, TOP, SEQ)}
    pruning = duels(matched_pairs(arms, "NAEE") + matched_pairs(arms, "MC-MoE"))
    return [
        claimed(
            "An elected coreset is better than a random one of the same size.",
            against[LOT], second=VOTE, first="the random coreset",
        ),
        claimed(
            "At equal experts, sharing by DES-Vote is more accurate than keeping fewer experts "
            "for each token (top-k).",
            against[TOP], second=VOTE, first=TOP,
        ),
        claimed(
            "At equal experts, DES-Vote is more accurate than dropping unlikely experts "
            "(NAEE, MC-MoE).",
            pruning, second=VOTE, first="NAEE or MC-MoE",
        ),
        claimed(
            "At equal experts, DES-Vote is more accurate than DES-Seq.",
            against[SEQ], second=VOTE, first=SEQ,
        ),
        headline(arms, [VOTE, SEQ]),
        guarded_gain(arms),
        front_told(arms),
    ]  # fmt: skip


def headline(arms: Arms, labels: Sequence[str]) -> Finding:
    """99 % of the accuracy with 55 % fewer experts: the smallest of DES that keeps so much."""
    tallies = [tally for label in labels for tally in arms.groups[label]]
    keeping = [t for t in tallies if t.accuracy >= KEPT * arms.vanilla.accuracy]
    claim = "DES cuts unique experts by over 55 % and keeps 99 % of vanilla's accuracy."
    if not arms.vanilla.accuracy:
        text = "Vanilla itself answers nothing right: there is no accuracy to keep."
        return Finding(text, claim, "cannot be told here")
    if not keeping:
        text = f"No DES policy that was run keeps {KEPT:.0%} of vanilla's accuracy."
        return Finding(text, claim, "does not hold")
    best = min(keeping, key=lambda tally: tally.experts)
    saved = 1 - best.experts / arms.vanilla.experts
    low, high = best.share().interval
    text = (
        f"The smallest DES policy that keeps {KEPT:.0%} of vanilla's accuracy is {best.name}: "
        f"{best.accuracy:.1%} right ({low:.1%} to {high:.1%}) with {best.experts:.1f} experts, "
        f"{saved:.0%} fewer than vanilla's {arms.vanilla.experts:.1f}."
    )
    return Finding(text, claim, "holds" if saved > FEWER else "does not hold")


def guarded_gain(arms: Arms) -> str:
    """Not a claim of the paper: who votes, and what is kept, at the same sizes."""
    plain = {tally.policy: tally for tally in arms.groups[VOTE]}
    pairs = [(plain[t.policy.partition(",")[0]], t) for t in arms.groups[GUARDED]]
    widest = max(duels(pairs), key=lambda duel: duel.change.difference)
    return (
        "Beyond the paper: letting only words vote (not the fill after the end of the text) and "
        f"keeping every token's best expert changes most where {sentence(widest)}"
    )


def front_told(arms: Arms) -> str:
    front = pareto([arms.vanilla, *(t for group in arms.groups.values() for t in group)])
    told = ", ".join(f"{t.name} ({t.experts:.0f}, {t.accuracy:.1%})" for t in front)
    return f"Nobody beats these with as few experts (experts, right): {told}."


def main_tables(arms: Arms) -> list[Table]:
    fought = duels(arms.pairs)
    return [duel_table(fought, "DES-Vote against others at equal experts.")] if fought else []


def size_findings(arms: Arms) -> list[Finding | str]:
    """How far the coreset can shrink."""
    votes, vanilla = arms.groups[VOTE], arms.vanilla
    fought = {duel.second.name: duel for duel in duels([(vanilla, vote) for vote in votes])}
    even = [vote for vote in votes if fought[vote.name].sign == 0]
    smallest = min(even, key=lambda vote: vote.experts, default=None)
    small = next((vote for vote in votes if "beta=0.15" in vote.name), None)
    found: list[Finding | str] = []
    if not vanilla.accuracy:
        return ["Vanilla itself answers nothing right: there is no accuracy to keep."]
    if small is not None:
        kept = small.accuracy / vanilla.accuracy
        found.append(
            Finding(
                f"{sentence(fought[small.name])} It keeps {kept:.1%} of vanilla's accuracy.",
                "A coreset of 15 % of the experts keeps nearly all accuracy (the paper's setting "
                "for 256 experts).",
                "holds" if kept >= KEPT else "does not hold",
            )
        )
    if smallest is None:
        return [*found, "Every size that was run is below vanilla, beyond the interval."]
    return [
        *found,
        f"The smallest coreset that cannot be told from vanilla is {smallest.name}: "
        f"{smallest.accuracy:.1%} right against {vanilla.accuracy:.1%}.",
    ]


ACCURACY = Comparison(
    name="accuracy",
    title="Accuracy against experts (Fig. 1c)",
    question="What does each way of touching fewer experts cost in right answers?",
    caption="Right answers against unique experts, with 95 % Wilson intervals; each marker is one "
    "policy at one size. Dotted: vanilla's accuracy, and the Pareto front over all policies. "
    "Guarded: only words vote, not the fill after the end of the text, and every voter's best "
    "expert is kept.",
    views={"accuracy": (), "accuracy-few": (VOTE, SEQ, TOP, LOT, GUARDED, PROPORTIONAL)},
    groups=every_rule,
    matched=met_by_vote,
    found=main_findings,
    front=True,
    tabulate=main_tables,
)
SIZE = Comparison(
    name="coreset-size",
    title="The size of the coreset (Fig. 7a)",
    question="How small can the elected set become before answers go wrong?",
    caption="Right answers of DES-Vote and of a random coreset as the coreset grows, with 95 % "
    "Wilson intervals.",
    groups=lambda _: {VOTE: by_beta("des-vote", BETAS), LOT: by_beta("random", FEW)},
    found=size_findings,
)
