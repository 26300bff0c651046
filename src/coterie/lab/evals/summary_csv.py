"""The results of an evaluation as rows of a CSV."""

from __future__ import annotations

from coterie.lab.evals.report import PolicySummary, run_figures


def csv_row(summary: PolicySummary) -> dict[str, object]:
    """The row of one policy, with all digits; the first policy has no change."""
    change, result, accuracy = summary.change, summary.result, summary.accuracy
    metrics = {**summary.by_task, **summary.other_metrics}
    return {
        "policy": result.policy,
        "right": accuracy.successes,
        "n": accuracy.n,
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.interval[0],
        "accuracy_high": accuracy.interval[1],
        **{f"accuracy {name}": share.value for name, share in metrics.items()},
        "change": None if change is None else change.difference,
        "change_low": None if change is None else change.interval[0],
        "change_high": None if change is None else change.interval[1],
        "gained": None if change is None else change.gained,
        "lost": None if change is None else change.lost,
        "p": None if change is None else change.p_value,
        "p_holm": summary.p_holm,
        "relative_accuracy": summary.relative_accuracy,
        **run_figures(result),
        **_traffic_columns(summary),
    }


def _traffic_columns(summary: PolicySummary) -> dict[str, object]:
    """Empty where all experts are in memory."""
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
        "saved": None if savings is None else savings.value,
        "saved_low": None if savings is None else savings.interval[0],
        "saved_high": None if savings is None else savings.interval[1],
        "stall_seconds": traffic.wait_seconds,
    }
