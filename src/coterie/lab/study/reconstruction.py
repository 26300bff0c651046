"""Top-K recall and reconstruction loss against the size of the coreset (Fig. 4 right)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from matplotlib.figure import Figure

from coterie.lab.plotting import foreground
from coterie.lab.study.charts import line_chart, policy_series
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, Experiment, ExperimentText, Finding, Table, judge
from coterie.lab.study.fidelity import (
    METRIC_NAMES,
    CurveGap,
    FidelityScores,
    Metric,
    compare_policies,
    compare_to_curve,
    count_outcomes,
    fidelity_scores,
    gaps_table,
    metric_gaps,
    outcomes_text,
    scores_table,
    trace_vanilla,
)
from coterie.lab.study.variants import GUARD_OPTIONS

SHARES = (
    *("0.03125", "0.0625", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5"),
    *("0.6", "0.75", "1.0"),
)
MAIN_SHARES = ("0.0625", "0.15", "0.3", "0.5", "0.75")
DES_SEQ, DES_VOTE, RANDOM, TOP_K = "DES-Seq", "DES-Vote", "random", "top-k"
GUARDED, PROPORTIONAL = "DES-Vote, guarded", "proportional"
COMPARED_METRICS: tuple[Metric, ...] = ("recall", "word_recall", "loss", "word_loss")


class ReconstructionCurve(TypedDict):
    """The policies of one family, one per size."""

    name: str
    readings: list[FidelityScores]


class ReconstructionRecord(TypedDict):
    """Gaps to DES-Vote's curve at the same size, by metric.

    ``against`` is for DES-Seq, ``guarded`` for the guarded vote, ``ours`` for the proportional
    vote and ``control`` for random coresets.
    """

    experts: int
    k: int
    prompts: int
    looks: int
    layers: list[int]
    curves: list[ReconstructionCurve]
    against: dict[Metric, list[CurveGap]]
    guarded: dict[Metric, list[CurveGap]]
    ours: dict[Metric, list[CurveGap]]
    control: dict[Metric, list[CurveGap]]


class ReconstructionExperiment(Experiment):
    """Every policy routes the inputs of vanilla's layers, so errors do not accumulate."""

    text = ExperimentText.load("reconstruction")

    def measure(self, context: StudyContext) -> ReconstructionRecord:
        spec = context.engine.model.spec
        trace = trace_vanilla(context)
        families = policies_by_family(spec.router.k)
        policies = [policy for family in families.values() for policy in family]
        context.on_progress(0.02, f"{len(policies)} policies on {len(trace.prompts)} prompts")

        def on_progress(share: float) -> None:
            context.on_progress(0.02 + 0.95 * share, "routing")

        fidelity = compare_policies(context, trace, policies, on_progress)
        scores = dict(zip(policies, fidelity_scores(fidelity), strict=True))

        def gaps(selected: Sequence[str]) -> dict[Metric, list[CurveGap]]:
            return metric_gaps(fidelity, selected, families[DES_VOTE], COMPARED_METRICS)

        return ReconstructionRecord(
            experts=spec.router.experts,
            k=spec.router.k,
            prompts=len(trace.prompts),
            looks=trace.num_observations,
            layers=list(trace.layers),
            curves=[
                ReconstructionCurve(name=name, readings=[scores[policy] for policy in family])
                for name, family in families.items()
            ],
            against=gaps(families[DES_SEQ][:-1]),
            guarded=gaps(families[GUARDED]),
            ours=gaps(families[PROPORTIONAL]),
            control=gaps(families[RANDOM]),
        )

    def drawings(self, record: ReconstructionRecord) -> Sequence[Drawing]:
        layers = ", ".join(map(str, record["layers"]))
        return [
            Drawing(
                "recall",
                "Share of its own experts that a token keeps, against unique experts in use. Bars: "
                f"95 % interval over prompts. {record['prompts']} prompts, layers {layers}.",
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
                "The same over the answer tokens only: without the prompt's part of the block and "
                "without the fill after the end-of-text token.",
                lambda: draw_metric(record, "word_loss"),
            ),
        ]

    def tables(self, record: ReconstructionRecord) -> Sequence[Table]:
        readings = [reading for curve in record["curves"] for reading in curve["readings"]]
        return [
            scores_table(
                readings,
                f"Means over {record['looks']} observations (a row in a layer in a forward) of "
                f"vanilla's decoding; {record['experts']} experts, {record['k']} per token.",
            ),
            gaps_table(
                record["against"],
                "DES-Seq",
                "DES-Seq minus DES-Vote at the same number of experts, with 95 % intervals over "
                "prompts. DES-Vote's curve is linear between the measured sizes.",
            ),
        ]

    def findings(self, record: ReconstructionRecord) -> Sequence[Finding | str]:
        return [
            _control_finding(record),
            _seq_finding(
                record,
                "recall",
                "DES-Vote has a higher top-K recall than DES-Seq at the same coreset size.",
                " A set of the experts with most votes nearly maximises recall by definition.",
            ),
            _seq_finding(
                record,
                "loss",
                "DES-Vote has a lower reconstruction loss than DES-Seq at the same size.",
            ),
            _content_sentence(record),
            _versus_vote_sentence(record["guarded"], "The guarded vote"),
            _versus_vote_sentence(record["ours"], "The proportional vote (`proportional-vote`)"),
        ]


def policies_by_family(k: int) -> dict[str, list[str]]:
    """The policies of each family, smallest coreset first."""
    return {
        DES_VOTE: [f"des-vote:beta={share}" for share in SHARES],
        DES_SEQ: [f"des-seq:k={m}" for m in range(1, k + 1)],
        PROPORTIONAL: [f"proportional-vote:beta={share}" for share in MAIN_SHARES],
        GUARDED: [f"des-vote:beta={share},{GUARD_OPTIONS}" for share in MAIN_SHARES],
        TOP_K: [f"topk:k={m}" for m in range(1, k)],
        RANDOM: [f"random:beta={share}" for share in MAIN_SHARES],
    }


def draw_metric(record: ReconstructionRecord, metric: Metric) -> Figure:
    """One metric against unique experts, one line per family."""
    is_loss, series = metric.endswith("loss"), []
    for curve, label in zip(record["curves"], policies_by_family(1), strict=True):
        points = [reading for reading in curve["readings"] if not is_loss or reading[metric] > 0]
        intervals = [reading.get(f"{metric}_interval") for reading in points]
        known = [interval for interval in intervals if isinstance(interval, list)]
        series.append(
            policy_series(
                points[0]["policy"],
                [reading["experts"] for reading in points],
                [float(str(reading[metric])) for reading in points],
                label=label,
                line=":" if label in (RANDOM, TOP_K) else "-",
                intervals=known if len(known) == len(points) else None,
            )
        )
    x, y = f"unique experts of {record['experts']}", METRIC_NAMES[metric]
    if is_loss:
        return line_chart(series, x, y, log="y", xlim=(0, None), ylim=(1e-3, None), columns=3)
    figure = line_chart(series, x, y, percent="y", xlim=(0, None), ylim=(0, 1.03), columns=3)
    figure.axes[0].axhline(1.0, color=foreground(), linewidth=0.7)
    return figure


def _seq_finding(
    record: ReconstructionRecord, metric: Metric, claim: str, remark: str = ""
) -> Finding:
    gaps = record["against"][metric]
    if not gaps:
        return judge("No size of DES-Seq is within the sizes of DES-Vote.", claim, None)
    worse, better, similar = count_outcomes(gaps, metric)
    largest = max(gaps, key=lambda gap: abs(gap["gap"]))
    return judge(
        f"In {METRIC_NAMES[metric]}, DES-Vote is better than DES-Seq at {better} of {len(gaps)} "
        f"sizes, worse at {worse} and similar at {similar}. The largest difference is at "
        f"{largest['experts']:.0f} experts: DES-Vote {largest['curve']:.3f}, DES-Seq "
        f"{largest['value']:.3f}.{remark}",
        claim,
        better > len(gaps) / 2 and not worse,
    )


def _content_sentence(record: ReconstructionRecord) -> str:
    gaps = record["against"]["word_loss"]
    worse, better, similar = count_outcomes(gaps, "word_loss")
    return (
        f"Over answer tokens alone, DES-Vote's loss is lower than DES-Seq's at {better} of "
        f"{len(gaps)} sizes, higher at {worse} and similar at {similar}. The positions of the loss "
        "matter as much as its size."
    )


def _versus_vote_sentence(gaps_by_metric: Mapping[Metric, Sequence[CurveGap]], label: str) -> str:
    sizes = max(map(len, gaps_by_metric.values()))
    return (
        f"{label}, compared with plain DES-Vote of the same size (numbers of {sizes} sizes): "
        f"{outcomes_text(gaps_by_metric)}."
    )


def _control_finding(record: ReconstructionRecord) -> Finding:
    control = record["control"]
    metrics: tuple[Metric, ...] = ("recall", "loss")
    is_worse = [compare_to_curve(gap, metric) < 0 for metric in metrics for gap in control[metric]]
    nearest = min(control["recall"], key=lambda gap: abs(gap["gap"]), default=None)
    nearest_text = (
        ""
        if nearest is None
        else f" The smallest difference in recall is at {nearest['experts']:.0f} experts: "
        f"{nearest['value']:.3f} against {nearest['curve']:.3f}."
    )
    return judge(
        f"A random coreset is worse than an elected one of its size in {sum(is_worse)} of "
        f"{len(is_worse)} comparisons of recall and loss.{nearest_text}",
        "The election matters: an elected coreset is better than a random one.",
        bool(is_worse) and all(is_worse),
    )
