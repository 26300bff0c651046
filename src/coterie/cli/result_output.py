"""What ``generate`` and ``compare`` print of a result's experts and traffic."""

from __future__ import annotations

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.offload.capacity import format_bytes
from coterie.offload.traffic import Traffic


def memory_document(engine: Engine, result: Result) -> dict[str, object]:
    """As JSON, what the forwards of a result moved; empty where all experts are in memory. A
    simulated cache has no stalls: both are None."""
    model = engine.model
    if result.traffic is None:
        return {}
    document = {"slots": model.store.capacity, **result.traffic.to_dict()}
    if model.memory_config is not None and model.memory_config.simulated:
        document |= {"stall_seconds": None, "stalled": None}
    return {"expert_traffic": document}


def precision_document(engine: Engine) -> dict[str, object]:
    """As JSON, the votes served in each precision so far; empty with one precision."""
    stats = engine.model.store.precision_stats
    return {} if stats is None else {"expert_precision": stats.to_dict()}


def describe_traffic(traffic: Traffic) -> str:
    """The hit rate, the bytes from each tier, and the time without computation."""
    sources = (
        f"{format_bytes(transfer.bytes)} from {tier}"
        for tier, transfer in traffic.transfers.items()
    )
    stall = f", {traffic.stall_seconds:.2f} s waited" if traffic.stall_seconds else ""
    moved = " and ".join(sources) or "nothing moved"
    return f"; {traffic.hit_rate:.1%} cache hits, {moved}{stall}"
