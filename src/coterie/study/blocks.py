"""Robustness to the block size (Fig. 7b): what larger blocks do to answers and to experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from matplotlib.figure import Figure

from coterie.evals.run import Arm
from coterie.figures.style import axes, legend, look, percent
from coterie.naming import CoterieError
from coterie.study.arms import GUARD
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.curves import wilson
from coterie.study.duel import duels
from coterie.study.lab import Lab
from coterie.study.tally import Document, Tally

SIZES = (8, 16, 32, 64)
VANILLA, VOTE, GUARDED = "vanilla", "des-vote:beta=0.3", f"des-vote:beta=0.3,{GUARD}"


@dataclass(frozen=True)
class Blocks:
    """The same questions with blocks of several sizes; vanilla at each is what is compared with."""

    name: str = "block-size"
    title: str = "Robustness to the block size (Fig. 7b)"
    question: str = (
        "The more words are decoded together, the more experts they ask for, and the more must "
        "share one coreset. Does it still serve them?"
    )

    def measure(self, lab: Lab) -> Facts:
        policies = [VANILLA, VOTE, GUARDED, f"topk:k={_half(lab)}"]
        found: list[Document] = []
        skipped: list[str] = []
        for place, size in enumerate(SIZES):
            own = {} if size == lab.engine.generation.block else {"block": size}
            arms = [Arm(policy, own) for policy in policies]
            part = place / len(SIZES), (place + 1) / len(SIZES)
            try:
                tallies = [Tally.of_sheet(sheet) for sheet in lab.sheets(arms, part)]
            # Not every model may be asked for every width.
            except CoterieError as error:
                skipped.append(f"Blocks of {size} were left out: {error}.")
                continue
            documents = [tally.document(tallies[0]) for tally in tallies]
            found += [{"block": size, "arm": document} for document in documents]
        if not found:
            raise CoterieError(" ".join(skipped))
        return {
            "experts": lab.engine.model.spec.router.experts,
            "usual": lab.engine.generation.block,
            "policies": policies,
            "found": found,
            "skipped": skipped,
        }

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        by_policy = _by_policy(facts)
        return [
            Drawing(
                self.name,
                "Right answers against block size, with 95 % Wilson intervals. The model was "
                f"trained with blocks of {facts['usual']}.",
                lambda: _draw(by_policy, "right answers", lambda t: t.accuracy, bars=True),
            ),
            Drawing(
                f"{self.name}-experts",
                "Unique experts of a layer and forward against block size, in the same runs.",
                lambda: _draw(by_policy, f"unique experts of {facts['experts']}", _experts),
            ),
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        by_policy = _by_policy(facts)
        sizes = list(by_policy[VANILLA])
        rows = [
            [policy, *(_cell(told[size]) if size in told else "" for size in sizes)]
            for policy, told in by_policy.items()
        ]
        n = len(by_policy[VANILLA][sizes[0]].bits())
        caption = f"Right answers of {n}, experts, forwards a block."
        heads = ["policy", *(f"block {size}" for size in sizes)]
        return [Table(heads, rows, caption, numbers=range(1, len(heads)))]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        by_policy = _by_policy(facts)
        sizes = sorted(by_policy[VANILLA])
        small, large = sizes[0], sizes[-1]
        told: list[Finding | str] = []
        for policy in (VOTE, GUARDED):
            votes, vanilla = by_policy[policy], by_policy[VANILLA]
            relative = {s: votes[s].accuracy / max(vanilla[s].accuracy, 1e-9) for s in sizes}
            said = ", ".join(f"{relative[size]:.1%} at {size}" for size in sizes)
            fought = duels([(vanilla[size], votes[size]) for size in sizes])
            lost = [size for size, duel in zip(sizes, fought, strict=True) if duel.sign < 0]
            robust = relative[large] >= relative[small] - 0.01
            told.append(
                Finding(
                    f"Of vanilla's accuracy with the same blocks, {policy} keeps {said}. It is "
                    f"below vanilla beyond the interval at {_listed(lost)}.",
                    "DES stays accurate whatever the block size.",
                    "holds" if robust else "does not hold",
                )
            )
        return [*told, self._vanilla(by_policy[VANILLA]), *cast("list[str]", facts["skipped"])]

    def _vanilla(self, vanilla: dict[int, Tally]) -> str:
        said = ", ".join(f"{t.accuracy:.1%} at {size}" for size, t in sorted(vanilla.items()))
        return f"Vanilla itself answers {said} right."


def _by_policy(facts: Facts) -> dict[str, dict[int, Tally]]:
    """Policy -> block size -> what it came to."""
    found: dict[str, dict[int, Tally]] = {}
    for one in cast("list[dict[str, object]]", facts["found"]):
        tally = Tally.of(cast("Document", one["arm"]))
        found.setdefault(tally.policy, {})[cast("int", one["block"])] = tally
    return found


def _draw(
    by_policy: dict[str, dict[int, Tally]],
    label: str,
    figure_of: Callable[[Tally], float],
    *,
    bars: bool = False,
) -> Figure:
    figure, one = axes("block size (positions)", label)
    for place, (policy, told) in enumerate(by_policy.items()):
        sizes = sorted(told)
        tallies = [told[size] for size in sizes]
        dress = look(policy)
        one.errorbar(
            sizes, [figure_of(t) for t in tallies], yerr=wilson(tallies) if bars else None,
            color=dress.colour, marker=dress.marker, label=policy.replace(f",{GUARD}", ", guarded"),
            ls=("-", "--", ":", "-.")[place % 4], elinewidth=0.8,
        )  # fmt: skip
    one.set_xscale("log", base=2)
    one.set_xticks(SIZES, [str(size) for size in SIZES])
    one.set_ylim(0, None)
    if bars:
        percent(one)
    legend(one)
    return figure


def _experts(tally: Tally) -> float:
    return tally.experts


def _cell(tally: Tally) -> str:
    return f"{tally.accuracy:.1%}, {tally.experts:.1f}, {tally.forwards_per_block:.2f}"


def _half(lab: Lab) -> int:
    return max(1, lab.engine.model.spec.router.k // 2)


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) if sizes else "no size"
