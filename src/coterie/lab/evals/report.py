"""What a run found, one line a policy, for a table or a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coterie.keys import to_json
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.stats import PairedDifference, Proportion, holm_adjust, paired_difference
from coterie.lab.evals.traffic import TrafficSavings, traffic_savings


@dataclass(frozen=True)
class PolicySummary:
    """One policy: accuracy whole and by task; the change against the first policy, item by item.

    ``p_holm`` is the change's p raised for the number of policies that were compared; ``relative``
    is the accuracy as a share of the first one's, None where that is 0; ``saved`` are bytes moved,
    where not all experts are in memory.
    """

    result: EvalResult
    accuracy: Proportion
    by_task: dict[str, Proportion]
    other_metrics: dict[str, Proportion]  # a task's other measures: "gsm8k flexible"
    change: PairedDifference | None = None  # None: this is the first
    p_holm: float | None = None
    relative_accuracy: float | None = None
    savings: TrafficSavings | None = None

    def to_dict(self) -> dict[str, object]:
        """As JSON values; experts and bytes are per layer and decoding forward."""
        return {
            "policy": self.result.policy,
            "accuracy": _proportion_dict(self.accuracy),
            "by_task": {
                task: _proportion_dict(accuracy) for task, accuracy in self.by_task.items()
            },
            "also": {
                name: _proportion_dict(accuracy) for name, accuracy in self.other_metrics.items()
            },
            "change": None if self.change is None else _change_dict(self.change, self.p_holm),
            "relative_accuracy": self.relative_accuracy,
            "failed": self.result.num_failed,
            "experts": self.result.experts,
            "expert_bytes": self.result.expert_bytes,
            "vote_mass_kept": self.result.vote_mass_kept,
            "forwards_per_block": self.result.forwards_per_block,
            "new_tokens": self.result.new_tokens,
            "tokens_per_second": self.result.tokens_per_second,
            "seconds": self.result.seconds,
            **_traffic_dict(self),
        }


def summarize(results: Sequence[EvalResult], tasks: Sequence[str]) -> list[PolicySummary]:
    """The first sheet is the one that the others are compared with."""
    first, others = results[0], results[1:]
    baseline_accuracy = proportion(first.correct()).value
    changes = [paired_difference(first.correct(), result.correct()) for result in others]
    adjusted = holm_adjust([change.p_value for change in changes])
    summaries = [
        replace(
            _summary(result, tasks),
            change=change,
            p_holm=p,
            relative_accuracy=proportion(result.correct()).value / baseline_accuracy
            if baseline_accuracy
            else None,
            savings=traffic_savings(
                *([answer.traffic for answer in pair.answers] for pair in (first, result))
            ),
        )
        for result, change, p in zip(others, changes, adjusted, strict=True)
    ]
    return [_summary(first, tasks), *summaries]


def _summary(result: EvalResult, tasks: Sequence[str]) -> PolicySummary:
    return PolicySummary(
        result=result,
        accuracy=proportion(result.correct()),
        by_task={task: proportion(result.correct(task)) for task in tasks},
        other_metrics={
            f"{task} {name}": proportion(correct)
            for task in tasks
            for name, correct in result.other_metrics(task).items()
        },
    )


def proportion(correct: Sequence[bool]) -> Proportion:
    """How many are right of how many."""
    return Proportion(sum(correct), len(correct))


def _traffic_dict(summary: PolicySummary) -> dict[str, object]:
    """Nothing where all experts are in memory."""
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
