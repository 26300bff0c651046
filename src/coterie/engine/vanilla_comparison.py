"""Results against a run of the unmodified model on the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.engine.engine import Engine
from coterie.engine.events import Result


def memory_document(engine: Engine, result: Result) -> dict[str, object]:
    """The traffic of a result as JSON; empty where all experts are in memory.

    A simulated cache has no stalls: both values are None.
    """
    if result.traffic is None:
        return {}
    document = {"slots": engine.model.store.capacity, **result.traffic.to_dict()}
    if engine.model.memory_config is not None and engine.model.memory_config.simulated:
        document |= {"stall_seconds": None, "stalled": None}
    return {"expert_traffic": document}


def vanilla_line(result: Result, vanilla: Result) -> str:
    """What a policy read, compared with a vanilla run of the same prompt, in one line."""
    counts = vanilla_document(result, vanilla)
    forwards = f" in {result.forwards} forwards (vanilla {vanilla.forwards})"
    forwards = "" if result.forwards == vanilla.forwards else forwards
    same = "the same answer" if counts["same_answer"] else "another answer"
    return (
        f"{result.policy} read {result.experts.mean:.0f} of {result.experts.total} experts a layer "
        f"(vanilla {vanilla.experts.mean:.0f}), {counts['bytes_ratio']:.2f}x the bytes{forwards}; "
        f"{same}"
    )


def vanilla_document(result: Result, vanilla: Result) -> dict[str, object]:
    """The comparison as JSON. The ratio is of expert bytes over all decode forwards, 1 without."""
    size, base = (run.expert_bytes * run.experts.forwards for run in (result, vanilla))
    return {
        "text": vanilla.text, "forwards": vanilla.forwards, "experts_mean": vanilla.experts.mean,
        "expert_bytes": vanilla.expert_bytes, "bytes_ratio": size / base if base else 1.0,
        "same_answer": result.tokens == vanilla.tokens,
    }  # fmt: skip


def run_documents(engine: Engine, results: Sequence[Result]) -> list[dict[str, object]]:
    """The runs as JSON, vanilla first. ``saved`` is a share of the bytes that vanilla moved."""
    vanilla = results[0]
    documents = []
    for result in results:
        document = {**result.to_dict(), "equals_vanilla": result.tokens == vanilla.tokens}
        document |= {} if result.traffic is None else {"saved": saved_share(result, vanilla)}
        documents.append(document | memory_document(engine, result))
    return documents


def saved_share(result: Result, vanilla: Result) -> float | None:
    """The share of vanilla's bytes that were not moved; None for vanilla, or if it moved none."""
    if result == vanilla or result.traffic is None or vanilla.traffic is None:
        return None
    total = vanilla.traffic.bytes_moved
    return 1 - result.traffic.bytes_moved / total if total else None
