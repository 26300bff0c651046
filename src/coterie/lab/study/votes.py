"""What the paper leaves open: how votes are weighed, who is protected, how many, who votes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.lab.plotting import (
    BLUE,
    BROWN,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    add_legend,
    new_panels,
)
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.fidelity import (
    SLOW_STEPS,
    CurveGap,
    FidelityScores,
    compare_policies,
    fidelity_scores,
    gaps_to_curve,
    trace_vanilla,
)
from coterie.lab.study.reconstruction import (
    HEADS,
    compare_to_curve,
    gap_rows,
    scores_row,
    set_log_axis,
)

SHARES = ("0.1", "0.15", "0.2", "0.3", "0.4", "0.5")
MAIN_SHARES = ("0.15", "0.3", "0.5")
MASSES = ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
CURVE_SHARES = (
    "0.03125",
    "0.0625",
    "0.1",
    "0.125",
    "0.15",
    "0.2",
    "0.25",
    "0.3",
    "0.4",
    "0.5",
    "0.6",
)
VOTE_STYLES: Mapping[str, tuple[str, str]] = {  # colour, marker
    "masked": (BLUE, "o"),
    "weight": (GREEN, "D"),
    "count": (TEAL, "p"),
    "full": (PURPLE, "h"),
    "max": (BROWN, ">"),
}
VOTER_STYLES: Mapping[str, tuple[str, str]] = {
    "all": (BLUE, "o"),
    "unfilled": (RED, "P"),
    "masked": (ORANGE, "s"),
    "uncertain": (PURPLE, "h"),
}
LOSS_NAMES = {"loss": "loss", "word_loss": "loss, words", "open_loss": "loss, masked words"}
COMPARED_METRICS = ("recall", *LOSS_NAMES)
CURVE_POLICIES = [f"des-vote:beta={share}" for share in CURVE_SHARES]


class VoteGroup(TypedDict):
    """Policies that differ in one choice, by its values; ``gaps``: less the plain vote's curve at
    the same number of experts, figure by figure."""

    readings: dict[str, list[FidelityScores]]
    gaps: dict[str, dict[str, list[CurveGap]]]


class VotesRecord(TypedDict):
    experts: int
    prompts: int
    looks: dict[str, int]
    votes: VoteGroup
    protection: VoteGroup
    mass: VoteGroup
    voters: VoteGroup
    voters_protected: VoteGroup


@dataclass(frozen=True)
class VoteFidelityExperiment:
    """Votes, protection and size on vanilla's usual forwards; voters on slow ones, for where a
    block takes one forward, nothing is written yet and everybody is a word."""

    name: str = "votes-fidelity"
    title: str = "Votes, protection, size and voters: what they do to one layer"
    question: str = (
        "The paper sums the router's probabilities of every position. Would other votes, other "
        "voters, a protected best expert or a share of the votes in place of a fixed size keep "
        "the layer's output nearer to vanilla's?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        default, slow = trace_vanilla(context), trace_vanilla(context, slow=True)
        usual_groups = {
            "votes": vote_kind_policies(),
            "protection": protected_policies(),
            "mass": mass_policies(),
        }
        slow_groups = {
            "voters": voter_policies(""),
            "voters_protected": voter_policies(",protect=top1"),
        }
        vote_groups: dict[str, VoteGroup] = {}
        for trace, groups, start, activity in (
            (default, usual_groups, 0.02, "votes, protection, size"),
            (slow, slow_groups, 0.4, "voters"),
        ):
            all_policies = list(dict.fromkeys([*CURVE_POLICIES, *_all_policies(groups)]))

            def on_progress(share: float, start: float = start, activity: str = activity) -> None:
                context.on_progress(start + (0.6 if start > 0.1 else 0.38) * share, activity)

            fidelity = compare_policies(context, trace, all_policies, on_progress)
            by_policy = dict(zip(all_policies, fidelity_scores(fidelity), strict=True))
            for name, group in groups.items():
                vote_groups[name] = VoteGroup(
                    readings={
                        value: [by_policy[p] for p in family] for value, family in group.items()
                    },
                    gaps={
                        value: {
                            figure: gaps_to_curve(fidelity, family, CURVE_POLICIES, figure)
                            for figure in COMPARED_METRICS
                        }
                        for value, family in group.items()
                    },
                )
        record = {
            "experts": context.engine.model.spec.router.experts,
            "prompts": len(default.prompts),
            "looks": {"usual": default.num_observations, "slow": slow.num_observations},
            **vote_groups,
        }
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("VotesRecord", data)
        return [
            Drawing(
                "vote-definitions",
                "Reconstruction loss of coresets elected by five kinds of votes, at equal numbers "
                "elected, over all positions and over the answer's words.",
                lambda: draw_group(record, record["votes"]),
            ),
            Drawing(
                "who-votes",
                f"The same by who votes, on vanilla decoding in {SLOW_STEPS} forwards a block: over all "
                "positions, over words, over words still masked. Broken lines: everybody's best "
                "expert protected.",
                lambda: draw_voters(record),
            ),
            Drawing(
                "mass-or-fraction",
                "A share of the votes in place of a share of the experts: loss at equal mean size, "
                "and how far sizes spread from layer to layer and forward to forward.",
                lambda: draw_mass(record),
            ),
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("VotesRecord", data)
        titles = {
            "votes": ("Votes", record["votes"]),
            "protection": ("Top-1 protection", record["protection"]),
            "mass": ("Mass", record["mass"]),
            "voters": ("Voters, slow decoding", record["voters"]),
            "protected": ("Voters with top-1 protection", record["voters_protected"]),
        }
        heads = ["policy", "experts", "recall", *LOSS_NAMES.values()]
        return [
            Table(
                heads=heads,
                rows=[
                    cells
                    for value in group["gaps"]
                    if value != "masked" or title != "Votes"
                    for cells in gap_rows(group["gaps"][value])
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
                    scores_row(reading)
                    for _, group in titles.values()
                    for family in group["readings"].values()
                    for reading in family
                ],
                caption="Every policy of this chapter.",
                numbers=list(range(1, len(HEADS))),
            )
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("VotesRecord", data)
        return [
            _uniform_finding(record),
            _vote_kinds_sentence(record),
            _protection_sentence(record),
            _mass_sentence(record),
            *_voter_sentences(record),
        ]


def vote_kind_policies() -> dict[str, list[str]]:
    kinds = ("masked", "weight", "count", "full", "max")
    return {kind: [f"coreset:beta={s},vote={kind}" for s in SHARES] for kind in kinds}


def protected_policies() -> dict[str, list[str]]:
    return {"top1": [f"des-vote:beta={share},protect=top1" for share in SHARES]}


def mass_policies() -> dict[str, list[str]]:
    return {"mass": [f"mass-vote:tau={mass},least=1" for mass in MASSES]}


def voter_policies(extra_options: str) -> dict[str, list[str]]:
    """By who votes; "masked" are the positions still masked."""
    return {
        voters: [f"des-vote:beta={share},voters={voters}{extra_options}" for share in MAIN_SHARES]
        for voters in ("all", "unfilled", "masked", "uncertain")
    }


def draw_group(record: VotesRecord, group: VoteGroup) -> Figure:
    """Two panels: loss over all positions, over words."""
    figure, subplots = new_panels(2, columns=1, height=2.6)
    for ax, name in zip(subplots, ("loss", "word_loss"), strict=True):
        _draw_lines(ax, group, name, VOTE_STYLES)
    add_legend(subplots[0], columns=5)
    subplots[1].set_xlabel(f"unique experts of {record['experts']}")
    return figure


def draw_voters(record: VotesRecord) -> Figure:
    figure, subplots = new_panels(3, columns=1, height=2.5)
    for ax, name in zip(subplots, LOSS_NAMES, strict=True):
        _draw_lines(ax, record["voters"], name, VOTER_STYLES)
        _draw_lines(ax, record["voters_protected"], name, VOTER_STYLES, dashed=True)
    add_legend(subplots[0], columns=4)
    subplots[2].set_xlabel(f"unique experts of {record['experts']}")
    return figure


def draw_mass(record: VotesRecord) -> Figure:
    figure, (loss, spread) = new_panels(2, columns=1, height=2.6)
    fraction = record["votes"]["readings"]["masked"]
    for name, family, colour, marker in (
        ("fraction", fraction, BLUE, "o"),
        ("mass", record["mass"]["readings"]["mass"], TEAL, "^"),
    ):
        sizes = [reading["experts"] for reading in family]
        for ax, figure_name in ((loss, "loss"), (spread, "spread")):
            values = cast("list[float]", [reading[figure_name] for reading in family])
            ax.plot(sizes, values, color=colour, marker=marker, label=name)
    set_log_axis(loss)
    loss.set(ylabel="reconstruction loss")
    spread.set(ylabel="standard deviation", xlabel=f"unique experts of {record['experts']}")
    add_legend(loss)
    return figure


def _draw_lines(
    ax: Axes,
    group: VoteGroup,
    name: str,
    styles: Mapping[str, tuple[str, str]],
    *,
    dashed: bool = False,
) -> None:
    for value, family in group["readings"].items():
        colour, marker = styles[value]
        ax.plot(
            [reading["experts"] for reading in family],
            cast("list[float]", [reading[name] for reading in family]),
            color=colour,
            marker=marker,
            linestyle="--" if dashed else "-",
            label=None if dashed else value,
        )
    set_log_axis(ax)
    ax.set_ylabel(LOSS_NAMES[name])


def _all_policies(groups: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    return [policy for group in groups.values() for family in group.values() for policy in family]


def _count_outcomes(curve_gaps: Sequence[CurveGap], metric: str) -> tuple[int, int, int]:
    """Sizes at which it is better than the plain vote, worse, and how many there are."""
    marks = [compare_to_curve(gap, metric) for gap in curve_gaps]
    return marks.count(1), marks.count(-1), len(marks)


def _gaps_clause(gaps_of_value: Mapping[str, Sequence[CurveGap]]) -> str:
    """Figure by figure, in a clause."""
    clauses = []
    for figure, name in (("recall", "recall"), *LOSS_NAMES.items()):
        wins, losses, sizes = _count_outcomes(gaps_of_value[figure], figure)
        clauses.append(f"{name} better at {wins} and worse at {losses} of {sizes} sizes")
    return "; ".join(clauses)


def _uniform_finding(record: VotesRecord) -> Finding:
    gaps_by_metric = record["votes"]["gaps"]["count"]
    wins, losses, sizes = _count_outcomes(gaps_by_metric["loss"], "loss")
    otherwise = "does not hold" if wins else "cannot be told here"
    return Finding(
        f"Counting votes instead of summing probabilities (`count`): {_gaps_clause(gaps_by_metric)}. "
        "Recall is what counting maximises, by definition.",
        claim="Votes weighted by the router's probability lose less than uniform votes.",
        verdict="holds" if losses > sizes / 2 and not wins else otherwise,
    )


def _vote_kinds_sentence(record: VotesRecord) -> str:
    by_loss = {
        value: sum(reading["loss"] for reading in family) / len(family)
        for value, family in record["votes"]["readings"].items()
    }
    ordered = sorted(by_loss, key=lambda value: by_loss[value])
    text = ", ".join(f"`{value}` {by_loss[value]:.3f}" for value in ordered)
    return f"Mean reconstruction loss over the sizes, by vote: {text}."


def _protection_sentence(record: VotesRecord) -> str:
    return (
        "Protecting everybody's best expert, against plain votes at the same number of experts: "
        f"{_gaps_clause(record['protection']['gaps']['top1'])}."
    )


def _mass_sentence(record: VotesRecord) -> str:
    gaps_by_metric, mass_scores = record["mass"]["gaps"]["mass"], record["mass"]["readings"]["mass"]
    largest = max(mass_scores, key=lambda reading: reading["spread"])
    return (
        f"A share of the votes (mass) in place of a share of the experts, at equal mean size: "
        f"{_gaps_clause(gaps_by_metric)}. Its sizes spread: {largest['policy']} uses {largest['experts']:.0f} experts "
        f"with a standard deviation of {largest['spread']:.0f}, so that what is read cannot be "
        "planned for."
    )


def _voter_sentences(record: VotesRecord) -> list[str]:
    """By what is judged, who had better vote."""
    sentences = []
    for name, group in (
        ("Without protection", record["voters"]),
        ("With everybody's best expert protected", record["voters_protected"]),
    ):
        clauses = []
        for figure, loss_name in LOSS_NAMES.items():
            middle_scores = {voters: family[1] for voters, family in group["readings"].items()}
            best = min(middle_scores, key=lambda who: cast("float", middle_scores[who][figure]))
            value, all_value = (
                cast("float", middle_scores[voters][figure]) for voters in (best, "all")
            )
            comparison_text = "" if best == "all" else f"; `all`: {all_value:.3f}"
            clauses.append(f"{loss_name} is least with `{best}` ({value:.3f}{comparison_text})")
        sentences.append(
            f"{name}, by who votes at {MAIN_SHARES[1]} of the experts: {', '.join(clauses)}."
        )
    return sentences
