"""Ablations by fidelity in single layers: vote definitions, protection, size and voters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

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
    SeriesStyle,
    add_legend,
    new_panels,
)
from coterie.lab.study.charts import Series, draw_series, set_log_axis
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, Experiment, ExperimentText, Finding, Table, judge
from coterie.lab.study.fidelity import (
    METRIC_NAMES,
    SLOW_STEPS,
    CurveGap,
    FidelityScores,
    Metric,
    VanillaTrace,
    compare_policies,
    count_outcomes,
    fidelity_scores,
    gaps_table,
    metric_gaps,
    outcomes_text,
    scores_table,
    trace_vanilla,
)

SHARES = ("0.1", "0.15", "0.2", "0.3", "0.4", "0.5")
MAIN_SHARES = ("0.15", "0.3", "0.5")
MASSES = ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
CURVE_SHARES = (
    *("0.03125", "0.0625", "0.1", "0.125", "0.15", "0.2", "0.25", "0.3", "0.4", "0.5", "0.6"),
)
CURVE_POLICIES = [f"des-vote:beta={share}" for share in CURVE_SHARES]
STYLES: Mapping[str, SeriesStyle] = {
    name: SeriesStyle(colour, marker, name)
    for name, colour, marker in (
        *(("masked", BLUE, "o"), ("weight", GREEN, "D"), ("count", TEAL, "p")),
        *(("full", PURPLE, "h"), ("max", BROWN, ">"), ("share of experts", BLUE, "o")),
        *(("all", BLUE, "o"), ("unfilled", RED, "P"), ("masked positions", ORANGE, "s")),
        *(("uncertain", PURPLE, "h"), ("share of votes", TEAL, "^")),
    )
}
LOSSES: tuple[Metric, ...] = ("loss", "word_loss", "open_loss")
COMPARED_METRICS: tuple[Metric, ...] = ("recall", *LOSSES)


class VoteGroup(TypedDict):
    """Policies that differ in one choice, by its values.

    ``gaps`` are the differences to the plain vote at the same number of experts, by metric.
    """

    readings: dict[str, list[FidelityScores]]
    gaps: dict[str, dict[Metric, list[CurveGap]]]


class VotesRecord(TypedDict):
    """``looks`` are the numbers of observations in usual and slow decoding."""

    experts: int
    prompts: int
    looks: dict[str, int]
    votes: VoteGroup
    protection: VoteGroup
    mass: VoteGroup
    voters: VoteGroup
    voters_protected: VoteGroup


class VoteFidelityExperiment(Experiment):
    """Votes, protection and size on vanilla's usual forwards, voters on slow ones.

    Where a block takes a single forward, no position is written yet and all positions vote alike.
    """

    text = ExperimentText.load("votes-fidelity")

    def measure(self, context: StudyContext) -> VotesRecord:
        usual, slow = trace_vanilla(context), trace_vanilla(context, slow=True)
        usual_groups = {
            "votes": vote_kind_policies(),
            "protection": {"top1": [f"des-vote:beta={share},protect=top1" for share in SHARES]},
            "mass": {"mass": [f"mass-vote:tau={mass},least=1" for mass in MASSES]},
        }
        slow_groups = {
            "voters": voter_policies(""),
            "voters_protected": voter_policies(",protect=top1"),
        }

        def progress(first: float, last: float, activity: str) -> Callable[[float], None]:
            return lambda share: context.on_progress(first + (last - first) * share, activity)

        on_usual = progress(0.02, 0.4, "votes, protection, size")
        groups: Any = {
            **measure_groups(context, usual, usual_groups, on_usual),
            **measure_groups(context, slow, slow_groups, progress(0.4, 1.0, "voters")),
        }
        return VotesRecord(
            experts=context.engine.model.spec.router.experts,
            prompts=len(usual.prompts),
            looks={"usual": usual.num_observations, "slow": slow.num_observations},
            **groups,
        )

    def drawings(self, record: VotesRecord) -> Sequence[Drawing]:
        return [
            Drawing(
                "vote-definitions",
                "Reconstruction loss of coresets of equal size by five definitions of a vote, over "
                "all positions and over answer tokens.",
                lambda: draw_losses(record, ("loss", "word_loss"), [(record["votes"], "-")]),
            ),
            Drawing(
                "voters-fidelity",
                "Reconstruction loss by the positions that vote, while vanilla decodes in "
                f"{SLOW_STEPS} forwards per block: over all positions, over answer tokens, over "
                "masked answer tokens. Dashed: with top-1 protection.",
                lambda: draw_losses(
                    record, LOSSES, [(record["voters"], "-"), (record["voters_protected"], "--")]
                ),
            ),
            Drawing(
                "mass-or-fraction",
                "A share of the votes instead of a share of the experts: loss at equal mean size, "
                "and the spread of sizes over layers and forwards.",
                lambda: draw_mass(record),
            ),
        ]

    def tables(self, record: VotesRecord) -> Sequence[Table]:
        groups = {
            "Votes": record["votes"],
            "Top-1 protection": record["protection"],
            "Mass": record["mass"],
            "Voters, slow decoding": record["voters"],
            "Voters with top-1 protection": record["voters_protected"],
        }
        tables = []
        for title, group in groups.items():
            gaps: dict[Metric, list[CurveGap]] = {metric: [] for metric in COMPARED_METRICS}
            for value, gaps_of_value in group["gaps"].items():
                for metric in COMPARED_METRICS if (title, value) != ("Votes", "masked") else ():
                    gaps[metric] += gaps_of_value[metric]
            caption = (
                f"{title}: the difference to plain DES-Vote at the same number of experts, with "
                "95 % intervals over prompts."
            )
            tables.append(gaps_table(gaps, "policy", caption))
        scores = [
            reading
            for group in groups.values()
            for family in group["readings"].values()
            for reading in family
        ]
        return [*tables, scores_table(scores, "Every policy of this experiment.")]

    def findings(self, record: VotesRecord) -> Sequence[Finding | str]:
        return [
            _uniform_finding(record),
            _vote_kinds_sentence(record),
            "Top-1 protection, compared with plain votes at the same number of experts (numbers of "
            f"sizes): {outcomes_text(record['protection']['gaps']['top1'])}.",
            _mass_sentence(record),
            _voters_sentence("Without protection", record["voters"]),
            _voters_sentence("With top-1 protection", record["voters_protected"]),
        ]


def measure_groups(
    context: StudyContext,
    trace: VanillaTrace,
    groups: Mapping[str, Mapping[str, Sequence[str]]],
    on_progress: Callable[[float], None],
) -> dict[str, VoteGroup]:
    """Scores and gaps of all policies of these groups on one trace."""
    policies = [
        policy for group in groups.values() for family in group.values() for policy in family
    ]
    policies = list(dict.fromkeys([*CURVE_POLICIES, *policies]))
    fidelity = compare_policies(context, trace, policies, on_progress)
    scores = dict(zip(policies, fidelity_scores(fidelity), strict=True))
    return {
        name: VoteGroup(
            readings={
                value: [scores[policy] for policy in family] for value, family in group.items()
            },
            gaps={
                value: metric_gaps(fidelity, family, CURVE_POLICIES, COMPARED_METRICS)
                for value, family in group.items()
            },
        )
        for name, group in groups.items()
    }


def vote_kind_policies() -> dict[str, list[str]]:
    kinds = ("masked", "weight", "count", "full", "max")
    return {kind: [f"coreset:beta={s},vote={kind}" for s in SHARES] for kind in kinds}


def voter_policies(extra_options: str) -> dict[str, list[str]]:
    """By voters; "masked" are the positions still masked."""
    return {
        voters: [f"des-vote:beta={share},voters={voters}{extra_options}" for share in MAIN_SHARES]
        for voters in ("all", "unfilled", "masked", "uncertain")
    }


def draw_losses(
    record: VotesRecord, metrics: Sequence[Metric], groups: Sequence[tuple[VoteGroup, str]]
) -> Figure:
    """One panel per loss; every group has its line style."""
    figure, subplots = new_panels(len(metrics), columns=1, height=2.6 if len(metrics) < 3 else 2.5)
    for ax, metric in zip(subplots, metrics, strict=True):
        for group, line in groups:
            for value, family in group["readings"].items():
                is_voter = value == "masked" and len(groups) > 1
                style = STYLES["masked positions" if is_voter else value]
                label = value if line == "-" else None
                _draw_family(ax, family, metric, style, label=label, line=line)
        set_log_axis(ax)
        ax.set_ylabel(METRIC_NAMES[metric].replace("reconstruction ", ""))
    add_legend(subplots[0], columns=5 if len(groups) == 1 else 4)
    subplots[-1].set_xlabel(f"unique experts of {record['experts']}")
    return figure


def draw_mass(record: VotesRecord) -> Figure:
    figure, (loss, spread) = new_panels(2, columns=1, height=2.6)
    for label, family in (
        ("share of experts", record["votes"]["readings"]["masked"]),
        ("share of votes", record["mass"]["readings"]["mass"]),
    ):
        for ax, key in ((loss, "loss"), (spread, "spread")):
            _draw_family(ax, family, key, STYLES[label], label=label)
    set_log_axis(loss)
    loss.set(ylabel="reconstruction loss")
    spread.set(ylabel="standard deviation", xlabel=f"unique experts of {record['experts']}")
    add_legend(loss)
    return figure


def _draw_family(
    ax: Axes,
    family: Sequence[FidelityScores],
    key: str,
    style: SeriesStyle,
    *,
    label: str | None,
    line: str = "-",
) -> None:
    values = [float(str(reading[key])) for reading in family]
    draw_series(ax, Series(label, [reading["experts"] for reading in family], values, style, line))


def _uniform_finding(record: VotesRecord) -> Finding:
    gaps = record["votes"]["gaps"]["count"]
    better, worse, similar = count_outcomes(gaps["loss"], "loss")
    holds = worse > (better + worse + similar) / 2 and not better
    return judge(
        "Counting votes instead of summing probabilities (`count`), compared at the same number of "
        f"experts (numbers of sizes): {outcomes_text(gaps)}. Counting maximises recall by "
        "definition.",
        "Votes weighted by the router's probability have a lower loss than uniform votes.",
        True if holds else False if better else None,
    )


def _vote_kinds_sentence(record: VotesRecord) -> str:
    losses = {
        value: sum(reading["loss"] for reading in family) / len(family)
        for value, family in record["votes"]["readings"].items()
    }
    ordered = sorted(losses.items(), key=lambda entry: entry[1])
    text = ", ".join(f"`{value}` {loss:.3f}" for value, loss in ordered)
    return f"Mean reconstruction loss over the sizes, by vote: {text}."


def _mass_sentence(record: VotesRecord) -> str:
    largest = max(record["mass"]["readings"]["mass"], key=lambda reading: reading["spread"])
    return (
        "A share of the votes (mass) instead of a share of the experts, at equal mean size "
        f"(numbers of sizes): {outcomes_text(record['mass']['gaps']['mass'])}. Its sizes vary: "
        f"{largest['policy']} uses {largest['experts']:.0f} experts with a standard deviation of "
        f"{largest['spread']:.0f}, so the number of experts to load is not known in advance."
    )


def _voters_sentence(label: str, group: VoteGroup) -> str:
    """The voters with the least loss, by metric."""
    middle = {voters: family[1] for voters, family in group["readings"].items()}
    clauses = []
    for metric in LOSSES:
        values = {voters: float(str(reading[metric])) for voters, reading in middle.items()}
        best = min(values, key=lambda voters: values[voters])
        baseline = "" if best == "all" else f"; `all`: {values['all']:.3f}"
        clauses.append(f"{METRIC_NAMES[metric]} with `{best}` ({values[best]:.3f}{baseline})")
    return f"{label}, the lowest losses at {MAIN_SHARES[1]} of the experts: {', '.join(clauses)}."
