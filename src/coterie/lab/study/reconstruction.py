"""Top-K recall and reconstruction loss against the size of the coreset (Fig. 4 right)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from coterie.lab.plotting import add_legend, foreground, format_percent, new_axes, policy_style
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.fidelity import (
    CurveGap,
    FidelityScores,
    compare_policies,
    fidelity_scores,
    gaps_to_curve,
    trace_vanilla,
)

SHARES = (
    *("0.03125", "0.0625", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5"),
    *("0.6", "0.75", "1.0"),
)
MAIN_SHARES = ("0.0625", "0.15", "0.3", "0.5", "0.75")
DES_SEQ, DES_VOTE, GUARDED, RANDOM, TOP_K = (
    "DES-Seq",
    "DES-Vote",
    "words vote, top-1",
    "random",
    "top-k",
)
PROPORTIONAL = "proportional"
COMPARED_METRICS = ("recall", "word_recall", "loss", "word_loss")
HEADS = (
    *("policy", "experts", "votes kept", "recall", "of words"),
    *("loss", "of words", "of words still masked"),
)
METRIC_NAMES: Mapping[str, str] = {
    "recall": "top-K recall",
    "word_recall": "top-K recall, words only",
    "loss": "reconstruction loss",
    "word_loss": "reconstruction loss, words only",
    "open_loss": "reconstruction loss, words still masked",
}


class ReconstructionCurve(TypedDict):
    """Policies of one family, one a size."""

    name: str
    readings: list[FidelityScores]


class ReconstructionRecord(TypedDict):
    """``against`` holds, by figure, DES-Seq's policies less DES-Vote's curve at their own size;
    ``control`` the same for the random control."""

    experts: int
    k: int
    prompts: int
    looks: int
    layers: list[int]
    curves: list[ReconstructionCurve]
    against: dict[str, list[CurveGap]]
    guarded: dict[str, list[CurveGap]]
    ours: dict[str, list[CurveGap]]
    control: dict[str, list[CurveGap]]


@dataclass(frozen=True)
class ReconstructionExperiment:
    """Every policy routes what vanilla's gates read, and its layer's output is held against
    vanilla's: nothing that it would have changed before can add up."""

    name: str = "reconstruction"
    title: str = "Top-K recall and reconstruction loss against coreset size (Fig. 4 right)"
    question: str = (
        "With so many experts to choose from, how many of its own does a token keep, and how far "
        "is the layer's output from what it would have been?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        spec = context.engine.model.spec
        trace = trace_vanilla(context)
        families = policies_by_family(spec.router.k)
        all_policies = [policy for family in families.values() for policy in family]
        context.on_progress(0.02, f"{len(all_policies)} policies on {len(trace.prompts)} prompts")
        fidelity = compare_policies(
            context,
            trace,
            all_policies,
            lambda share: context.on_progress(0.02 + 0.95 * share, "routing"),
        )
        by_policy = dict(zip(all_policies, fidelity_scores(fidelity), strict=True))
        seq, vote = families[DES_SEQ][:-1], families[DES_VOTE]

        def gaps_by_metric(selected: Sequence[str]) -> dict[str, list[CurveGap]]:
            return {
                figure: gaps_to_curve(fidelity, selected, vote, figure)
                for figure in COMPARED_METRICS
            }

        record = ReconstructionRecord(
            experts=spec.router.experts,
            k=spec.router.k,
            prompts=len(trace.prompts),
            looks=trace.num_observations,
            layers=list(trace.layers),
            curves=[
                ReconstructionCurve(name=name, readings=[by_policy[policy] for policy in family])
                for name, family in families.items()
            ],
            against=gaps_by_metric(seq),
            guarded=gaps_by_metric(families[GUARDED]),
            ours=gaps_by_metric(families[PROPORTIONAL]),
            control=gaps_by_metric(families[RANDOM]),
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("ReconstructionRecord", data)
        where = f"{record['prompts']} prompts, layers {', '.join(map(str, record['layers']))}"
        return [
            Drawing(
                "recall",
                "Share of every token's own experts that it keeps, against unique experts really "
                f"used. Bars: 95 % interval over prompts. {where}.",
                lambda: draw_metric(record, "recall"),
            ),
            Drawing(
                "reconstruction-loss",
                "Squared distance of the layer's output to vanilla's, relative to vanilla's square "
                "(logarithmic), on the same input, over all positions of the block.",
                lambda: draw_metric(record, "loss"),
            ),
            Drawing(
                "reconstruction-loss-words",
                "The same over the positions of the answer only: without the prompt's part of the "
                "block, and without the fill behind the end-of-text.",
                lambda: draw_metric(record, "word_loss"),
            ),
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("ReconstructionRecord", data)
        return [
            Table(
                heads=HEADS,
                rows=[
                    scores_row(reading)
                    for curve in record["curves"]
                    for reading in curve["readings"]
                ],
                caption=f"On {record['looks']} looks (a row in a layer in a forward) at vanilla's "
                f"decoding; {record['experts']} experts, {record['k']} a token.",
                numbers=list(range(1, len(HEADS))),
            ),
            Table(
                heads=[
                    "DES-Seq",
                    "experts",
                    *(METRIC_NAMES[figure] for figure in COMPARED_METRICS),
                ],
                rows=gap_rows(record["against"]),
                caption="DES-Seq less DES-Vote at the same number of experts, with 95 % intervals "
                "over prompts. Between measured sizes DES-Vote's curve is taken as straight.",
                numbers=[1, 2, 3, 4, 5],
            ),
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("ReconstructionRecord", data)
        return [
            _control_finding(record),
            _seq_finding(
                record,
                "recall",
                "Vote keeps a higher top-K recall than Seq at the same coreset size.",
                " A set of the most wanted experts nearly maximises recall by its definition.",
            ),
            _seq_finding(
                record, "loss", "Vote has a lower reconstruction loss than Seq at the same size."
            ),
            _content_sentence(record),
            _versus_vote_sentence(record["guarded"], "With only words voting and top-1 kept"),
            _versus_vote_sentence(record["ours"], "Elected in proportion (`proportional-vote`)"),
        ]


def policies_by_family(k: int) -> dict[str, list[str]]:
    """By family, the smallest coreset first."""
    return {
        DES_VOTE: [f"des-vote:beta={share}" for share in SHARES],
        DES_SEQ: [f"des-seq:k={m}" for m in range(1, k + 1)],
        PROPORTIONAL: [f"proportional-vote:beta={share}" for share in MAIN_SHARES],
        GUARDED: [f"des-vote:beta={share},voters=before-eos,protect=top1" for share in MAIN_SHARES],
        TOP_K: [f"topk:k={m}" for m in range(1, k)],
        RANDOM: [f"random:beta={share}" for share in MAIN_SHARES],
    }


def scores_row(reading: FidelityScores) -> list[str]:
    """A line of the table."""
    shares = [f"{reading[name]:.1%}" for name in ("mass", "recall", "word_recall")]
    losses = [f"{reading[name]:.3f}" for name in ("loss", "word_loss", "open_loss")]
    return [reading["policy"], f"{reading['experts']:.1f}", *shares, *losses]


def gap_rows(gaps_by_metric: Mapping[str, Sequence[CurveGap]]) -> list[list[str]]:
    """A line a policy: what it has more than the curve, figure by figure."""
    by_policy: dict[str, list[str]] = {}
    for metric_gaps in gaps_by_metric.values():
        for gap in metric_gaps:
            row = by_policy.setdefault(gap["policy"], [gap["policy"], f"{gap['experts']:.1f}"])
            low, high = gap["interval"]
            row.append(f"{gap['gap']:+.3f} ({low:+.3f} to {high:+.3f})")
    return list(by_policy.values())


def compare_to_curve(gap: CurveGap, figure: str) -> int:
    """1 where the policy beats the curve beyond the interval, -1 where it loses, else 0."""
    sign = -1 if figure.endswith("loss") else 1
    low, high = sorted(sign * end for end in gap["interval"])
    return int(low > 0) - int(high < 0)


def draw_metric(record: ReconstructionRecord, metric: str) -> Figure:
    """One figure against unique experts, a line a family."""
    fig, ax = new_axes(f"unique experts of {record['experts']}", METRIC_NAMES[metric])
    for curve in record["curves"]:
        points = [r for r in curve["readings"] if not metric.endswith("loss") or r[metric] > 0]
        style = policy_style(points[0]["policy"])
        heights = [reading[metric] for reading in points]
        ends = [reading.get(f"{metric}_interval") for reading in points]
        errors = None
        if all(end is not None for end in ends):
            pairs = [cast("list[float]", end) for end in ends]
            errors = [
                [max(0.0, h - low) for h, (low, _) in zip(heights, pairs, strict=True)],
                [max(0.0, high - h) for h, (_, high) in zip(heights, pairs, strict=True)],
            ]
        ax.errorbar(
            [reading["experts"] for reading in points],
            heights,
            yerr=errors,
            color=style.colour,
            marker=style.marker,
            linestyle=":" if curve["name"] in (RANDOM, TOP_K) else "-",
            elinewidth=0.8,
            label=curve["name"],
        )
    if metric.endswith("loss"):
        set_log_axis(ax)
        ax.set_ylim(bottom=1e-3)
    else:
        ax.axhline(1.0, color=foreground(), linewidth=0.7)
        ax.set_ylim(0, 1.03)
        format_percent(ax)
    ax.set_xlim(left=0)
    add_legend(ax, columns=3)
    return fig


def set_log_axis(ax: Axes, axis: Literal["x", "y"] = "y") -> None:
    """In powers, labelled 0.01, 0.02, 0.05, 0.1 ..."""
    (ax.set_yscale if axis == "y" else ax.set_xscale)("log")
    target = ax.yaxis if axis == "y" else ax.xaxis
    target.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    target.set_major_formatter(lambda value, _: f"{value:g}")
    target.set_minor_formatter(NullFormatter())


def _count_outcomes(gaps_of_figure: Sequence[CurveGap], figure: str) -> tuple[int, int, int]:
    """In how many sizes the curve is better, worse, and neither beyond its interval."""
    marks = [compare_to_curve(gap, figure) for gap in gaps_of_figure]
    return marks.count(-1), marks.count(1), marks.count(0)


def _seq_finding(
    record: ReconstructionRecord, figure: str, claim: str, remark: str = ""
) -> Finding:
    curve_gaps = record["against"][figure]
    if not curve_gaps:
        return Finding("No size of DES-Seq lies among DES-Vote's.", claim, "cannot be told here")
    wins, losses, ties = _count_outcomes(curve_gaps, figure)
    largest = max(curve_gaps, key=lambda gap: abs(gap["gap"]))
    return Finding(
        f"In {METRIC_NAMES[figure]}, of {len(curve_gaps)} sizes, Vote is better than Seq at {wins}, worse at "
        f"{losses}, and not told apart at {ties}. Furthest apart at "
        f"{largest['experts']:.0f} experts: Vote {largest['curve']:.3f}, Seq {largest['value']:.3f}."
        f"{remark}",
        claim,
        "holds" if wins > len(curve_gaps) / 2 and not losses else "does not hold",
    )


def _content_sentence(record: ReconstructionRecord) -> str:
    curve_gaps = record["against"]["word_loss"]
    wins, losses, ties = _count_outcomes(curve_gaps, "word_loss")
    return (
        f"Over the words of the answer alone, Vote's loss is lower than Seq's at {wins} of "
        f"{len(curve_gaps)} sizes, higher at {losses}, not told apart at {ties}: where the loss falls "
        "matters as much as how large it is."
    )


def _versus_vote_sentence(gaps_by_metric: Mapping[str, Sequence[CurveGap]], label: str) -> str:
    clauses = []
    for figure, metric_gaps in gaps_by_metric.items():
        wins, losses, ties = _count_outcomes(metric_gaps, figure)
        clauses.append(
            f"{METRIC_NAMES[figure]} better at {losses}, worse at {wins}, alike at {ties}"
        )
    sizes = max(map(len, gaps_by_metric.values()))
    return f"{label}, against plain Vote of the same size ({sizes} sizes): {'; '.join(clauses)}."


def _control_finding(record: ReconstructionRecord) -> Finding:
    curve_gaps = record["control"]["recall"] + record["control"]["loss"]
    is_worse = [
        compare_to_curve(gap, figure) < 0
        for figure in ("recall", "loss")
        for gap in record["control"][figure]
    ]
    smallest = min(record["control"]["recall"], key=lambda gap: abs(gap["gap"]), default=None)
    nearest_text = (
        ""
        if smallest is None
        else f" Nearest in recall at {smallest['experts']:.0f} experts: {smallest['value']:.3f} "
        f"against {smallest['curve']:.3f}."
    )
    return Finding(
        f"A random coreset is worse than a voted one of its size in {sum(is_worse)} of {len(curve_gaps)} "
        f"comparisons of recall and loss.{nearest_text}",
        claim="What a block elects is not arbitrary: a voted coreset beats a random one.",
        verdict="holds" if is_worse and all(is_worse) else "does not hold",
    )
