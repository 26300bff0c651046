"""Metrics of single forwards that rank policies as their accuracy does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np
from matplotlib.figure import Figure

from coterie.errors import TaskError
from coterie.lab.plotting import add_legend, format_percent, new_panels, policy_style
from coterie.lab.study.charts import Series, draw_series, set_log_axis
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    format_interval,
    judge,
    make_table,
)
from coterie.lab.study.fidelity import (
    METRIC_NAMES,
    METRICS,
    SLOW_STEPS,
    FidelitySums,
    Metric,
    bootstrap,
    compare_policies,
    trace_vanilla,
)
from coterie.lab.study.rank_stats import spearman
from coterie.lab.study.results import VariantResults
from coterie.routing import needs_importance, parse_policy

TRACE_NAMES = ("usual", "slow")
BOOTSTRAP_DRAWS = 200


class PolicyMetrics(TypedDict):
    """The accuracy of one policy, and its metrics on the usual forwards."""

    policy: str
    accuracy: float
    figures: dict[Metric, float]


class RankAgreement(TypedDict):
    """Rank correlation with accuracy over policies: 1 is the same order (losses count reversed).

    The interval is a bootstrap over the prompts of the metric.
    """

    rho: float
    interval: list[float]


class PredictorsRecord(TypedDict):
    points: list[PolicyMetrics]
    agreement: dict[str, dict[Metric, RankAgreement]]  # trace -> metric


class PredictorsExperiment(Experiment):
    """Accuracy from the record ``accuracy``, metrics from vanilla's forwards alone."""

    text = ExperimentText.load("foretelling")

    def measure(self, context: StudyContext) -> PredictorsRecord:
        accuracy = _accuracies(context)
        policies, accuracies = list(accuracy), list(accuracy.values())
        fidelity_by_trace: dict[str, FidelitySums] = {}
        for index, name in enumerate(TRACE_NAMES):
            # Slow decoding takes many times the forwards, so half the prompts are enough.
            prompts = context.num_prompts if name == "usual" else -(-context.num_prompts // 2)
            trace = trace_vanilla(replace(context, num_prompts=prompts), slow=name == "slow")

            def on_progress(share: float, index: int = index, name: str = name) -> None:
                activity = f"{len(policies)} policies, {name}"
                context.on_progress((index + share) / len(TRACE_NAMES), activity)

            fidelity_by_trace[name] = compare_policies(context, trace, policies, on_progress)
        totals = fidelity_by_trace["usual"].sums.sum(dim=1).numpy()
        points = [
            PolicyMetrics(
                policy=policy,
                accuracy=accuracy[policy],
                figures={metric: float(METRICS[metric](totals)[index]) for metric in METRIC_NAMES},
            )
            for index, policy in enumerate(policies)
        ]

        def agreement(name: str) -> dict[Metric, RankAgreement]:
            fidelity = fidelity_by_trace[name]
            return {m: rank_agreement(fidelity, m, accuracies) for m in METRIC_NAMES}

        return PredictorsRecord(points=points, agreement={n: agreement(n) for n in TRACE_NAMES})

    def drawings(self, record: PredictorsRecord) -> Sequence[Drawing]:
        caption = "Accuracy against two metrics of single forwards, one point per policy."
        return [Drawing("foretelling", caption, lambda: draw_metrics(record))]

    def tables(self, record: PredictorsRecord) -> Sequence[Table]:
        usual, slow = (record["agreement"][name] for name in TRACE_NAMES)
        return [
            make_table(
                f"Rank correlation with accuracy over {len(record['points'])} policies; 1 is the "
                "same order. 95 % intervals over prompts.",
                list(METRIC_NAMES),
                {
                    "metric": lambda metric: METRIC_NAMES[metric],
                    "usual decoding": lambda metric: _format_agreement(usual[metric]),
                    f"{SLOW_STEPS} forwards per block": lambda m: _format_agreement(slow[m]),
                },
            )
        ]

    def findings(self, record: PredictorsRecord) -> Sequence[Finding | str]:
        usual = record["agreement"]["usual"]
        best = max(METRIC_NAMES, key=lambda metric: usual[metric]["rho"])
        metrics: tuple[Metric, ...] = ("recall", "loss")
        return [
            *(_predictor_finding(metric, usual[metric], usual["experts"]) for metric in metrics),
            f"Over {len(record['points'])} policies, the metric with the highest rank correlation "
            f"is {METRIC_NAMES[best]}: {_format_agreement(usual[best])}.",
        ]


def rank_agreement(
    fidelity: FidelitySums, metric: Metric, accuracies: Sequence[float]
) -> RankAgreement:
    """The agreement of one metric with the accuracies of the same policies."""
    sign = -1.0 if metric.endswith("loss") else 1.0
    samples = METRICS[metric](bootstrap(fidelity.sums, draws=BOOTSTRAP_DRAWS))
    rhos = [sign * spearman(values, accuracies) for values in samples]
    low, high = np.quantile(rhos, [0.025, 0.975])
    totals = METRICS[metric](fidelity.sums.sum(dim=1).numpy())
    return RankAgreement(
        rho=sign * spearman(totals, accuracies), interval=[float(low), float(high)]
    )


def draw_metrics(record: PredictorsRecord) -> Figure:
    figure, subplots = new_panels(2, columns=1, height=2.9)
    metrics: tuple[Metric, ...] = ("recall", "loss")
    for ax, metric in zip(subplots, metrics, strict=True):
        for point in record["points"]:
            value, style = point["figures"][metric], policy_style(point["policy"])
            if metric != "loss" or value > 0:
                draw_series(ax, Series(style.name, [value], [point["accuracy"]], style, line=""))
        ax.set(xlabel=METRIC_NAMES[metric], ylabel="accuracy", ylim=(-0.03, 1.03))
        format_percent(ax)
    format_percent(subplots[0], axis="x")
    set_log_axis(subplots[1], axis="x")
    add_legend(subplots[0], columns=3)
    return figure


def _accuracies(context: StudyContext) -> dict[str, float]:
    """Accuracy of every policy that needs no importance, with the default generation options."""
    results = VariantResults.from_record(context.needed_record("accuracy"))
    accuracies = {
        result.policy: result.accuracy
        for result in results.by_name.values()
        if result.generation == results.vanilla.generation
        and not needs_importance(parse_policy(result.policy))
    }
    if len(accuracies) < 3:
        raise TaskError("the record of `accuracy` has fewer than three policies to rank")
    return accuracies


def _predictor_finding(metric: Metric, agreement: RankAgreement, size: RankAgreement) -> Finding:
    """Whether a metric ranks policies better than their numbers of experts do."""
    (low, high), rho = agreement["interval"], size["rho"]
    name = METRIC_NAMES[metric]
    return judge(
        f"The rank correlation of {name} with accuracy is {_format_agreement(agreement)}; that of "
        f"unique experts is {_format_agreement(size)}.",
        f"The {name} of single forwards predicts accuracy better than the number of experts does.",
        True if low > rho else False if high < rho else None,
    )


def _format_agreement(agreement: RankAgreement) -> str:
    return format_interval(agreement["rho"], agreement["interval"], ".2f")
