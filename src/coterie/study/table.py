"""Table 1: every policy on every task, with what the paper's table leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.evals.run import Arm
from coterie.study.accuracy import FEWER, KEPT
from coterie.study.arms import GUARD, compare
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.curves import relative
from coterie.study.duel import p_value
from coterie.study.lab import Lab
from coterie.study.tally import Arms, Tally

UNITS = ("B", "KB", "MB", "GB")


def chosen(k: int) -> list[Arm]:
    """One or two sizes of each rule."""
    return [
        Arm(f"topk:k={max(1, k // 2)}"),
        Arm("naee:beta=0.4"),
        Arm("mc-moe:beta=0.4,protect=0.02"),
        Arm(f"des-seq:k={min(3, k)}"),
        Arm("des-vote:beta=0.5"),
        Arm("des-vote:beta=0.3"),
        Arm("des-vote:beta=0.15"),
        Arm("uniform-vote:beta=0.3"),
        Arm("xshare:beta=0.3"),
        Arm("mass-vote:tau=0.7"),
        Arm("random:beta=0.3"),
        Arm(f"des-vote:beta=0.3,{GUARD}"),
        Arm(f"des-vote:beta=0.15,{GUARD}"),
    ]


@dataclass(frozen=True)
class TableOne:
    """The runs are those of the other chapters; this one sets them side by side."""

    name: str = "table-1"
    title: str = "Every policy on every task (Table 1)"
    question: str = "What does each rule keep of every kind of question, and what is read for it?"

    def measure(self, lab: Lab) -> Facts:
        return compare(lab, {"all": chosen(lab.engine.model.spec.router.k)})

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        del facts
        return []

    def tables(self, facts: Facts) -> Sequence[Table]:
        arms = Arms.of(facts)
        tallies = [arms.vanilla, *arms.groups["all"]]
        return [_right(tallies), _paired(tallies), _traffic(tallies)]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        arms = Arms.of(facts)
        vanilla = arms.vanilla
        n, (low, high) = vanilla.share().n, vanilla.share().interval
        hardest = [_spread(tally, vanilla) for tally in arms.groups["all"][4:7]]
        keeping = [
            tally.name
            for tally in arms.groups["all"]
            if tally.accuracy >= KEPT * vanilla.accuracy
            and tally.experts <= (1 - FEWER) * vanilla.experts
        ]
        return [
            f"Vanilla answers {vanilla.accuracy:.1%} of {n} right ({low:.1%} to {high:.1%}). "
            "Relative accuracy, which the paper reports alone, stands beside the counts here.",
            *hardest,
            f"With at least {KEPT:.0%} of vanilla's accuracy and {FEWER:.0%} fewer experts: "
            f"{', '.join(keeping) or 'nobody in this table'}.",
        ]


def _right(tallies: Sequence[Tally]) -> Table:
    tasks = list(tallies[0].right)
    rows = [
        [tally.name, _share(tally), *(_share(tally, task) for task in tasks)] for tally in tallies
    ]
    n = len(tallies[0].bits(tasks[0]))
    return Table(
        ["policy", "all", *tasks],
        rows,
        f"Right answers with their 95 % Wilson intervals, in percent; {n} questions of each task.",
        numbers=range(1, len(tasks) + 2),
    )


def _share(tally: Tally, task: str | None = None) -> str:
    share = tally.share(task)
    low, high = share.interval
    return f"{100 * share.value:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _paired(tallies: Sequence[Tally]) -> Table:
    vanilla, rows = tallies[0], []
    for tally in tallies[1:]:
        change = tally.against(vanilla)
        low, high = change.interval
        rows.append(
            [
                tally.name,
                f"{change.difference:+.1%}",
                f"{low:+.1%} to {high:+.1%}",
                f"{change.gained}, {change.lost}",
                p_value(change.p, bare=True),
                relative(tally, vanilla),
            ]
        )
    return Table(
        ["policy", "against vanilla", "95 %", "gained, lost", "p", "relative accuracy"],
        rows,
        "The same questions, pair by pair: bootstrap interval, McNemar's exact p.",
        numbers=range(1, 6),
    )


def _traffic(tallies: Sequence[Tally]) -> Table:
    rows = [
        [
            tally.name,
            f"{tally.experts:.1f}",
            readable(tally.expert_bytes),
            f"{tally.vote_mass_kept:.3f}",
            f"{tally.forwards_per_block:.2f}",
            f"{tally.experts * tally.forwards_per_block:.0f}",
        ]
        for tally in tallies
    ]
    heads = ["policy", "experts", "bytes", "votes kept", "forwards", "experts a block"]
    return Table(
        heads,
        rows,
        "Unique experts and their bytes for each layer and forward; denoising forwards for each "
        "block, and the product of the two. Speed has a chapter of its own, where policies take "
        "turns.",
        numbers=range(1, len(heads)),
    )


def _spread(tally: Tally, vanilla: Tally) -> str:
    """On which tasks a policy loses most and least."""
    gained = {t: tally.share(t).value - vanilla.share(t).value for t in vanilla.right}
    worst, best = min(gained, key=lambda t: gained[t]), max(gained, key=lambda t: gained[t])
    return (
        f"{tally.name} keeps {relative(tally, vanilla)} of vanilla's accuracy: its "
        f"answers suffer most on {worst} ({gained[worst]:+.1%}), least on {best} "
        f"({gained[best]:+.1%})."
    )


def readable(size: float) -> str:
    """Bytes with a decimal unit: 393216 -> "393 KB"."""
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.{0 if size >= 100 else 1}f} {UNITS[unit]}"
