"""What the paper leaves open: how votes are weighed, who is protected, how many, who votes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.figures.style import (
    BLUE,
    BROWN,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    legend,
    panels,
)
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.fidelity import SLOW, Gap, Reading, compared, gaps, readings, traced
from coterie.study.lab import Lab
from coterie.study.reconstruction import HEADS, better, log_axis, row, versus_rows

SHARES = ("0.1", "0.15", "0.2", "0.3", "0.4", "0.5")
FEWER = ("0.15", "0.3", "0.5")
MASSES = ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
LINE = ("0.03125", "0.0625", "0.1", "0.125", "0.15", "0.2", "0.25", "0.3", "0.4", "0.5", "0.6")
WEIGHED: Mapping[str, tuple[str, str]] = {  # colour, marker
    "masked": (BLUE, "o"),
    "weight": (GREEN, "D"),
    "count": (TEAL, "p"),
    "full": (PURPLE, "h"),
    "max": (BROWN, ">"),
}
VOTERS: Mapping[str, tuple[str, str]] = {
    "all": (BLUE, "o"),
    "unfilled": (RED, "P"),
    "masked": (ORANGE, "s"),
    "uncertain": (PURPLE, "h"),
}
LOSSES = {"loss": "loss", "word_loss": "loss, words", "open_loss": "loss, masked words"}
JUDGED = ("recall", *LOSSES)
PLAIN = [f"des-vote:beta={share}" for share in LINE]


class Group(TypedDict):
    """Policies that differ in one choice, by its values; ``gaps``: less the plain vote's curve at
    the same number of experts, figure by figure."""

    readings: dict[str, list[Reading]]
    gaps: dict[str, dict[str, list[Gap]]]


class Found(TypedDict):
    experts: int
    prompts: int
    looks: dict[str, int]
    votes: Group
    protection: Group
    mass: Group
    voters: Group
    voters_protected: Group


@dataclass(frozen=True)
class Votes:
    """Votes, protection and size on vanilla's usual forwards; voters on slow ones, for where a
    block takes one forward, nothing is written yet and everybody is a word."""

    name: str = "votes-fidelity"
    title: str = "Votes, protection, size and voters: what they do to one layer"
    question: str = (
        "The paper sums the router's probabilities of every position. Would other votes, other "
        "voters, a protected best expert or a share of the votes in place of a fixed size keep "
        "the layer's output nearer to vanilla's?"
    )

    def measure(self, lab: Lab) -> Facts:
        usual, slow = traced(lab), traced(lab, slow=True)
        first = {"votes": weighed(), "protection": protected(), "mass": sized()}
        second = {"voters": voting(""), "voters_protected": voting(",protect=top1")}
        parts: dict[str, Group] = {}
        for trace, groups, start, doing in (
            (usual, first, 0.02, "votes, protection, size"),
            (slow, second, 0.4, "voters"),
        ):
            every = list(dict.fromkeys([*PLAIN, *_flat(groups)]))

            def tell(share: float, start: float = start, doing: str = doing) -> None:
                lab.tell(start + (0.6 if start > 0.1 else 0.38) * share, doing)

            tally = compared(lab, trace, every, tell)
            by_policy = dict(zip(every, readings(tally), strict=True))
            for name, group in groups.items():
                parts[name] = Group(
                    readings={value: [by_policy[p] for p in same] for value, same in group.items()},
                    gaps={
                        value: {figure: gaps(tally, same, PLAIN, figure) for figure in JUDGED}
                        for value, same in group.items()
                    },
                )
        found = {
            "experts": lab.engine.model.spec.router.experts,
            "prompts": len(usual.prompts),
            "looks": {"usual": usual.looks, "slow": slow.looks},
            **parts,
        }
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        return [
            Drawing(
                "vote-definitions",
                "Reconstruction loss of coresets elected by five kinds of votes, at equal numbers "
                "elected, over all positions and over the answer's words.",
                lambda: draw_group(found, found["votes"]),
            ),
            Drawing(
                "who-votes",
                f"The same by who votes, on vanilla decoding in {SLOW} forwards a block: over all "
                "positions, over words, over words still masked. Broken lines: everybody's best "
                "expert protected.",
                lambda: draw_voters(found),
            ),
            Drawing(
                "mass-or-fraction",
                "A share of the votes in place of a share of the experts: loss at equal mean size, "
                "and how far sizes spread from layer to layer and forward to forward.",
                lambda: draw_mass(found),
            ),
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        titles = {
            "votes": ("Votes", found["votes"]),
            "protection": ("Top-1 protection", found["protection"]),
            "mass": ("Mass", found["mass"]),
            "voters": ("Voters, slow decoding", found["voters"]),
            "protected": ("Voters with top-1 protection", found["voters_protected"]),
        }
        heads = ["policy", "experts", "recall", *LOSSES.values()]
        return [
            Table(
                heads=heads,
                rows=[
                    line
                    for value in group["gaps"]
                    if value != "masked" or title != "Votes"
                    for line in versus_rows(group["gaps"][value])
                ],
                caption=f"{title}: less plain DES-Vote at the same number of experts, with 95 % "
                "intervals over prompts.",
                numbers=[1, 2, 3, 4, 5],
            )
            for title, group in titles.values()
        ] + [
            Table(
                heads=HEADS,
                rows=[
                    row(reading)
                    for _, group in titles.values()
                    for same in group["readings"].values()
                    for reading in same
                ],
                caption="Every policy of this chapter.",
                numbers=list(range(1, len(HEADS))),
            )
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        return [
            _uniform(found),
            _definitions(found),
            _protection(found),
            _mass(found),
            *_voters(found),
        ]


def weighed() -> dict[str, list[str]]:
    kinds = ("masked", "weight", "count", "full", "max")
    return {kind: [f"coreset:beta={s},vote={kind}" for s in SHARES] for kind in kinds}


def protected() -> dict[str, list[str]]:
    return {"top1": [f"des-vote:beta={share},protect=top1" for share in SHARES]}


def sized() -> dict[str, list[str]]:
    return {"mass": [f"mass-vote:tau={mass},least=1" for mass in MASSES]}


def voting(also: str) -> dict[str, list[str]]:
    """By who votes; "masked" are the positions still masked."""
    return {
        who: [f"des-vote:beta={share},voters={who}{also}" for share in FEWER]
        for who in ("all", "unfilled", "masked", "uncertain")
    }


def draw_group(found: Found, group: Group) -> Figure:
    """Two panels: loss over all positions, over words."""
    figure, two = panels(2, columns=1, height=2.6)
    for one, name in zip(two, ("loss", "word_loss"), strict=True):
        _lines(one, group, name, WEIGHED)
    legend(two[0], columns=5)
    two[1].set_xlabel(f"unique experts of {found['experts']}")
    return figure


def draw_voters(found: Found) -> Figure:
    figure, three = panels(3, columns=1, height=2.5)
    for one, name in zip(three, LOSSES, strict=True):
        _lines(one, found["voters"], name, VOTERS)
        _lines(one, found["voters_protected"], name, VOTERS, dashed=True)
    legend(three[0], columns=4)
    three[2].set_xlabel(f"unique experts of {found['experts']}")
    return figure


def draw_mass(found: Found) -> Figure:
    figure, (loss, spread) = panels(2, columns=1, height=2.6)
    fraction = found["votes"]["readings"]["masked"]
    for name, same, colour, mark in (
        ("fraction", fraction, BLUE, "o"),
        ("mass", found["mass"]["readings"]["mass"], TEAL, "^"),
    ):
        sizes = [reading["experts"] for reading in same]
        for one, figure_name in ((loss, "loss"), (spread, "spread")):
            values = cast("list[float]", [reading[figure_name] for reading in same])
            one.plot(sizes, values, color=colour, marker=mark, label=name)
    log_axis(loss)
    loss.set(ylabel="reconstruction loss")
    spread.set(ylabel="standard deviation", xlabel=f"unique experts of {found['experts']}")
    legend(loss)
    return figure


def _lines(
    one: Axes,
    group: Group,
    name: str,
    dresses: Mapping[str, tuple[str, str]],
    *,
    dashed: bool = False,
) -> None:
    for value, same in group["readings"].items():
        colour, mark = dresses[value]
        one.plot(
            [reading["experts"] for reading in same],
            cast("list[float]", [reading[name] for reading in same]),
            color=colour,
            marker=mark,
            linestyle="--" if dashed else "-",
            label=None if dashed else value,
        )
    log_axis(one)
    one.set_ylabel(LOSSES[name])


def _flat(groups: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    return [policy for group in groups.values() for same in group.values() for policy in same]


def _counted(here: Sequence[Gap], figure: str) -> tuple[int, int, int]:
    """Sizes at which it is better than the plain vote, worse, and how many there are."""
    marks = [better(gap, figure) for gap in here]
    return marks.count(1), marks.count(-1), len(marks)


def _said(gaps_of_value: Mapping[str, Sequence[Gap]]) -> str:
    """Figure by figure, in a clause."""
    clauses = []
    for figure, name in (("recall", "recall"), *LOSSES.items()):
        wins, losses, sizes = _counted(gaps_of_value[figure], figure)
        clauses.append(f"{name} better at {wins} and worse at {losses} of {sizes} sizes")
    return "; ".join(clauses)


def _uniform(found: Found) -> Finding:
    here = found["votes"]["gaps"]["count"]
    wins, losses, sizes = _counted(here["loss"], "loss")
    clear = "does not hold" if wins else "cannot be told here"
    return Finding(
        f"Counting votes instead of summing probabilities (`count`): {_said(here)}. "
        "Recall is what counting maximises, by definition.",
        claim="Votes weighted by the router's probability lose less than uniform votes.",
        verdict="holds" if losses > sizes / 2 and not wins else clear,
    )


def _definitions(found: Found) -> str:
    by_loss = {
        value: sum(reading["loss"] for reading in same) / len(same)
        for value, same in found["votes"]["readings"].items()
    }
    order = sorted(by_loss, key=lambda value: by_loss[value])
    said = ", ".join(f"`{value}` {by_loss[value]:.3f}" for value in order)
    return f"Mean reconstruction loss over the sizes, by vote: {said}."


def _protection(found: Found) -> str:
    return (
        "Protecting everybody's best expert, against plain votes at the same number of experts: "
        f"{_said(found['protection']['gaps']['top1'])}."
    )


def _mass(found: Found) -> str:
    here, sizes = found["mass"]["gaps"]["mass"], found["mass"]["readings"]["mass"]
    widest = max(sizes, key=lambda reading: reading["spread"])
    return (
        f"A share of the votes (mass) in place of a share of the experts, at equal mean size: "
        f"{_said(here)}. Its sizes spread: {widest['policy']} uses {widest['experts']:.0f} experts "
        f"with a standard deviation of {widest['spread']:.0f}, so that what is read cannot be "
        "planned for."
    )


def _voters(found: Found) -> list[str]:
    """By what is judged, who had better vote."""
    lines = []
    for name, group in (
        ("Without protection", found["voters"]),
        ("With everybody's best expert protected", found["voters_protected"]),
    ):
        clauses = []
        for figure, of in LOSSES.items():
            middle = {who: same[1] for who, same in group["readings"].items()}
            best = min(middle, key=lambda who: cast("float", middle[who][figure]))
            value, plain = (cast("float", middle[who][figure]) for who in (best, "all"))
            beside = "" if best == "all" else f"; `all`: {plain:.3f}"
            clauses.append(f"{of} is least with `{best}` ({value:.3f}{beside})")
        lines.append(f"{name}, by who votes at {FEWER[1]} of the experts: {', '.join(clauses)}.")
    return lines
