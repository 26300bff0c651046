"""Summaries of evaluation results, one per variant, for tables, JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.keys import to_json
from coterie.lab.evals.answer_log import AnswerTraffic
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.stats import (
    PairedDifference,
    Proportion,
    holm_adjust,
    paired_difference,
    ratio_interval,
)

RUN_FIGURES = (
    *("experts", "expert_bytes", "vote_mass_kept", "forwards_per_block"),
    *("new_tokens", "tokens_per_second", "seconds"),
)  # counts, means and times of an ``EvalResult``


@dataclass(frozen=True)
class TrafficSavings:
    """Fraction of a first variant's bytes that another did not move for the same items."""

    value: float
    interval: tuple[float, float]  # bootstrap over items, 95 %


@dataclass(frozen=True)
class PolicySummary:
    """Accuracy of one variant, overall and by task, and its paired change against the first.

    ``p_holm`` is the change's p adjusted for the number of comparisons. ``relative_accuracy`` is a
    fraction of the first variant's accuracy, None if that is 0. ``savings`` is None if all experts
    are in memory.
    """

    result: EvalResult
    accuracy: Proportion
    by_task: dict[str, Proportion]
    other_metrics: dict[str, Proportion]  # by task and metric: "gsm8k flexible"
    change: PairedDifference | None = None  # None for the first variant
    p_holm: float | None = None
    relative_accuracy: float | None = None
    savings: TrafficSavings | None = None

    def to_dict(self) -> dict[str, object]:
        """The summary as JSON values; experts and bytes are per layer and decoding forward."""
        change = self.change
        return {
            "policy": self.result.policy,
            "accuracy": _proportion_dict(self.accuracy),
            "by_task": {name: _proportion_dict(share) for name, share in self.by_task.items()},
            "also": {name: _proportion_dict(share) for name, share in self.other_metrics.items()},
            "change": change
            and {
                "value": change.difference,
                "gained": change.gained,
                "lost": change.lost,
                "interval": list(change.interval),
                "p": change.p_value,
                "p_holm": self.p_holm,
            },
            "relative_accuracy": self.relative_accuracy,
            **_run_figures(self.result),
            **_traffic_dict(self),
        }

    def csv_row(self) -> dict[str, object]:
        """The row of a CSV, with all digits; the first policy has no change."""
        change, accuracy = self.change, self.accuracy
        metrics = {**self.by_task, **self.other_metrics}
        return {
            "policy": self.result.policy,
            "right": accuracy.successes,
            "n": accuracy.n,
            **_with_ends("accuracy", accuracy.value, accuracy.interval),
            **{f"accuracy {name}": share.value for name, share in metrics.items()},
            **_with_ends("change", change and change.difference, change and change.interval),
            "gained": change and change.gained,
            "lost": change and change.lost,
            "p": change and change.p_value,
            "p_holm": self.p_holm,
            "relative_accuracy": self.relative_accuracy,
            **_run_figures(self.result),
            **_traffic_columns(self),
        }


def summarize(results: Sequence[EvalResult], tasks: Sequence[str]) -> list[PolicySummary]:
    """One summary per result; each is compared with the first."""
    first, *others = [_summary(result, tasks) for result in results]
    baseline, traffic = first.accuracy.value, [answer.traffic for answer in first.result.answers]
    correct = first.result.correct()
    changes = [paired_difference(correct, other.result.correct()) for other in others]
    adjusted = holm_adjust([change.p_value for change in changes])
    compared = [
        replace(
            other,
            change=change,
            p_holm=p,
            relative_accuracy=other.accuracy.value / baseline if baseline else None,
            savings=traffic_savings(traffic, [answer.traffic for answer in other.result.answers]),
        )
        for other, change, p in zip(others, changes, adjusted, strict=True)
    ]
    return [first, *compared]


def traffic_savings(
    first: Sequence[AnswerTraffic | None], other: Sequence[AnswerTraffic | None]
) -> TrafficSavings | None:
    """Savings over the items that succeeded in both; None if the first moved nothing."""
    pairs = [(a.bytes_moved, b.bytes_moved) for a, b in zip(first, other, strict=True) if a and b]
    if not sum(moved for moved, _ in pairs):
        return None
    before, after = zip(*pairs, strict=True)
    low, high = ratio_interval(after, before)
    return TrafficSavings(1 - sum(after) / sum(before), (1 - high, 1 - low))


def proportion(correct: Sequence[bool]) -> Proportion:
    """The proportion of true values."""
    return Proportion(sum(correct), len(correct))


def _summary(result: EvalResult, tasks: Sequence[str]) -> PolicySummary:
    other_metrics = {
        f"{task} {name}": proportion(correct)
        for task in tasks
        for name, correct in result.other_metrics(task).items()
    }
    by_task = {task: proportion(result.correct(task)) for task in tasks}
    return PolicySummary(result, proportion(result.correct()), by_task, other_metrics)


def _run_figures(result: EvalResult) -> dict[str, object]:
    return {"failed": result.num_failed, **{name: getattr(result, name) for name in RUN_FIGURES}}


def _traffic_dict(summary: PolicySummary) -> dict[str, object]:
    """Empty if all experts are in memory."""
    traffic, savings = summary.result.traffic, summary.savings
    if traffic is None:
        return {}
    fields = {
        **to_json(traffic),
        "hit_rate": traffic.hit_rate,
        "moved_a_forward": summary.result.bytes_per_forward,
        "saved_on_same_forwards": traffic.saved_vs_vanilla,
        "saved": savings and savings.value,
        "saved_interval": savings and list(savings.interval),
    }
    return {"expert_traffic": fields}


def _traffic_columns(summary: PolicySummary) -> Mapping[str, object]:
    """Empty if all experts are in memory."""
    traffic, savings = summary.result.traffic, summary.savings
    if traffic is None:
        return {}
    return {
        "experts_used": traffic.used,
        "hit_rate": traffic.hit_rate,
        "bytes_moved": traffic.bytes_moved,
        "bytes_without_cache": traffic.bytes_without_cache,
        "bytes_of_vanilla_on_same_forwards": traffic.bytes_vanilla,
        "moved_a_forward": summary.result.bytes_per_forward,
        **_with_ends("saved", savings and savings.value, savings and savings.interval),
        "stall_seconds": traffic.wait_seconds,
    }


def _with_ends(
    name: str, value: float | None, interval: tuple[float, float] | None
) -> dict[str, object]:
    low, high = interval or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _proportion_dict(accuracy: Proportion) -> dict[str, object]:
    return {"value": accuracy.value, "n": accuracy.n, "interval": list(accuracy.interval)}
