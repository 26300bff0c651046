"""Which figure of single forwards ranks policies as their accuracy does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, cast

import numpy as np
from matplotlib.figure import Figure

from coterie.errors import CoterieError
from coterie.lab.plotting import add_legend, format_percent, new_panels, policy_style
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.fidelity import (
    METRICS,
    SLOW_STEPS,
    FidelitySums,
    bootstrap,
    compare_policies,
    trace_vanilla,
)
from coterie.lab.study.rank_stats import spearman
from coterie.lab.study.reconstruction import set_log_axis
from coterie.lab.study.results import VariantResults
from coterie.routing import needs_importance, parse_policy

METRIC_NAMES: Mapping[str, str] = {
    "experts": "unique experts",
    "mass": "votes kept",
    "recall": "top-K recall",
    "word_recall": "top-K recall, words",
    "loss": "reconstruction loss",
    "word_loss": "reconstruction loss, words",
    "open_loss": "reconstruction loss, words still masked",
    "cosine": "cosine of the layer's output",
}
TRACE_NAMES = ("usual", "slow")
DRAWS = 200


class PolicyMetrics(TypedDict):
    """One policy: how many answers it left right, and its figures on the usual forwards."""

    policy: str
    accuracy: float
    figures: dict[str, float]


class RankAgreement(TypedDict):
    """Rank correlation with accuracy over policies, 1 being the same order (for losses: the
    reverse one); the interval is a bootstrap over the prompts of the figure."""

    rho: float
    interval: list[float]


class PredictorsRecord(TypedDict):
    points: list[PolicyMetrics]
    agreement: dict[str, dict[str, RankAgreement]]  # trace -> figure


@dataclass(frozen=True)
class PredictorsExperiment:
    """Accuracy is that of the chapter on accuracy, of whole answers; the figures come from
    vanilla's forwards alone, which cost seconds."""

    name: str = "foretelling"
    title: str = "What single forwards foretell of accuracy (not in the paper)"
    question: str = (
        "Recall and loss of a layer are cheap to measure, accuracy is not. Does any of them put "
        "policies in the order that their accuracy has?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        accuracy = _accuracies(context)
        policies = list(accuracy)
        accuracies = [accuracy[policy] for policy in policies]
        fidelity_by_trace: dict[str, FidelitySums] = {}
        for number, name in enumerate(TRACE_NAMES):
            # Slow decoding takes many times the forwards: half the prompts will do.
            share = context.num_prompts if name == "usual" else -(-context.num_prompts // 2)
            trace = trace_vanilla(replace(context, num_prompts=share), slow=name == "slow")

            def on_progress(done: float, number: int = number, name: str = name) -> None:
                context.on_progress(
                    (number + done) / len(TRACE_NAMES), f"{len(policies)} policies, {name}"
                )

            fidelity_by_trace[name] = compare_policies(context, trace, policies, on_progress)
        totals = fidelity_by_trace["usual"].sums.sum(dim=1).numpy()
        values = {name: METRICS[name](totals) for name in METRIC_NAMES}
        record = PredictorsRecord(
            points=[
                PolicyMetrics(
                    policy=policy,
                    accuracy=accuracy[policy],
                    figures={name: float(column[index]) for name, column in values.items()},
                )
                for index, policy in enumerate(policies)
            ],
            agreement={
                name: {
                    figure: rank_agreement(fidelity, figure, accuracies) for figure in METRIC_NAMES
                }
                for name, fidelity in fidelity_by_trace.items()
            },
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("PredictorsRecord", data)
        return [
            Drawing(
                "foretelling",
                "Accuracy of whole answers against two figures of single forwards, a point a "
                "policy.",
                lambda: draw_metrics(record),
            )
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("PredictorsRecord", data)
        return [
            Table(
                heads=["figure", "usual decoding", f"{SLOW_STEPS} forwards a block"],
                rows=[
                    [
                        text,
                        *(
                            _format_agreement(record["agreement"][name][figure])
                            for name in TRACE_NAMES
                        ),
                    ]
                    for figure, text in METRIC_NAMES.items()
                ],
                caption=f"Rank correlation with accuracy over {len(record['points'])} policies, "
                "1 being the same order; 95 % intervals over prompts.",
                numbers=[1, 2],
            )
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("PredictorsRecord", data)
        agreement_by_metric = record["agreement"]["usual"]
        best = max(METRIC_NAMES, key=lambda figure: agreement_by_metric[figure]["rho"])
        size = agreement_by_metric["experts"]
        return [
            *(
                _predictor_finding(METRIC_NAMES[figure], agreement_by_metric[figure], size)
                for figure in ("recall", "loss")
            ),
            f"Over {len(record['points'])} policies, nearest to the order of accuracy comes "
            f"{METRIC_NAMES[best]}, by {_format_agreement(agreement_by_metric[best])}.",
        ]


def rank_agreement(
    fidelity: FidelitySums, figure: str, accuracies: Sequence[float]
) -> RankAgreement:
    """Of one figure over policies with the shares of right answers, in the same order."""
    sign = -1.0 if figure.endswith("loss") else 1.0
    samples = METRICS[figure](bootstrap(fidelity.sums, draws=DRAWS))
    rhos = [sign * spearman(values, accuracies) for values in samples]
    low, high = np.quantile(rhos, [0.025, 0.975])
    totals = METRICS[figure](fidelity.sums.sum(dim=1).numpy())
    return RankAgreement(
        rho=sign * spearman(totals, accuracies), interval=[float(low), float(high)]
    )


def draw_metrics(record: PredictorsRecord) -> Figure:
    figure, subplots = new_panels(2, columns=1, height=2.9)
    for ax, name in zip(subplots, ("recall", "loss"), strict=True):
        for point in record["points"]:
            if name == "loss" and point["figures"][name] <= 0:
                continue
            style = policy_style(point["policy"])
            ax.plot(
                point["figures"][name],
                point["accuracy"],
                color=style.colour,
                marker=style.marker,
                linestyle="none",
                label=style.name,
            )
        ax.set(xlabel=METRIC_NAMES[name], ylabel="right answers", ylim=(-0.03, 1.03))
        format_percent(ax)
    format_percent(subplots[0], axis="x")
    set_log_axis(subplots[1], axis="x")
    add_legend(subplots[0], columns=3)
    return figure


def _accuracies(context: StudyContext) -> dict[str, float]:
    """Of every policy that can be watched, decoding as the model usually does."""
    data = context.record("accuracy")
    if data is None:
        raise CoterieError("needs the record of the chapter accuracy: ask for both")
    results = VariantResults.from_data(data)
    accuracy_by_policy = {
        result.policy: result.accuracy
        for result in results.by_name.values()
        if result.generation == results.vanilla.generation
        and not needs_importance(parse_policy(result.policy))
    }
    if len(accuracy_by_policy) < 3:
        raise CoterieError("the chapter accuracy has fewer than three policies to put in order")
    return accuracy_by_policy


def _predictor_finding(name: str, agreement: RankAgreement, size: RankAgreement) -> Finding:
    """Whether a figure orders policies better than the experts that they use do."""
    (low, high), rho = agreement["interval"], size["rho"]
    return Finding(
        f"{name[0].upper()}{name[1:]} ranks policies as accuracy does by {_format_agreement(agreement)}; counting "
        f"unique experts does by {_format_agreement(size)}.",
        claim=f"{name[0].upper()}{name[1:]} tells how well a policy will do (better than its size "
        "does).",
        verdict="holds" if low > rho else "does not hold" if high < rho else "cannot be told here",
    )


def _format_agreement(agreement: RankAgreement) -> str:
    low, high = agreement["interval"]
    return f"{agreement['rho']:.2f} ({low:.2f} to {high:.2f})"
