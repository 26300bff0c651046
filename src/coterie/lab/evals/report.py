"""Summaries of evaluation results, one per variant, for tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.keys import to_json
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.stats import PairedDifference, Proportion, holm_adjust, paired_difference
from coterie.lab.evals.traffic import AnswerTraffic, TrafficSavings, traffic_savings


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
        result = self.result
        return {
            "policy": result.policy,
            "accuracy": _proportion_dict(self.accuracy),
            "by_task": _proportion_dicts(self.by_task),
            "also": _proportion_dicts(self.other_metrics),
            "change": None if self.change is None else _change_dict(self.change, self.p_holm),
            "relative_accuracy": self.relative_accuracy,
            **run_figures(result),
            **_traffic_dict(self),
        }


def run_figures(result: EvalResult) -> dict[str, object]:
    """Counts, means and times of a variant, by JSON key."""
    return {
        "failed": result.num_failed,
        "experts": result.experts,
        "expert_bytes": result.expert_bytes,
        "vote_mass_kept": result.vote_mass_kept,
        "forwards_per_block": result.forwards_per_block,
        "new_tokens": result.new_tokens,
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
    }


def summarize(results: Sequence[EvalResult], tasks: Sequence[str]) -> list[PolicySummary]:
    """One summary per result; each is compared with the first."""
    first, summaries = results[0], [_summary(result, tasks) for result in results]
    baseline = summaries[0].accuracy.value
    changes = [paired_difference(first.correct(), result.correct()) for result in results[1:]]
    adjusted = holm_adjust([change.p_value for change in changes])
    compared = [
        replace(
            summary,
            change=change,
            p_holm=p,
            relative_accuracy=summary.accuracy.value / baseline if baseline else None,
            savings=traffic_savings(_answer_traffic(first), _answer_traffic(summary.result)),
        )
        for summary, change, p in zip(summaries[1:], changes, adjusted, strict=True)
    ]
    return [summaries[0], *compared]


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


def _answer_traffic(result: EvalResult) -> list[AnswerTraffic | None]:
    return [answer.traffic for answer in result.answers]


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
        "saved": None if savings is None else savings.value,
        "saved_interval": None if savings is None else list(savings.interval),
    }
    return {"expert_traffic": fields}


def _proportion_dicts(proportions: Mapping[str, Proportion]) -> dict[str, object]:
    return {name: _proportion_dict(accuracy) for name, accuracy in proportions.items()}


def _proportion_dict(accuracy: Proportion) -> dict[str, object]:
    return {"value": accuracy.value, "n": accuracy.n, "interval": list(accuracy.interval)}


def _change_dict(change: PairedDifference, p_holm: float | None) -> dict[str, object]:
    return {
        "value": change.difference,
        "gained": change.gained,
        "lost": change.lost,
        "interval": list(change.interval),
        "p": change.p_value,
        "p_holm": p_holm,
    }
