"""What ``generate`` and ``compare`` print of a result's experts and traffic."""

from __future__ import annotations

from coterie.cli.output import format_bytes
from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.offload.mixed_precision_store import MixedPrecisionStore
from coterie.offload.simulated_store import SimulatedCacheStore
from coterie.offload.traffic import Traffic


def memory_document(engine: Engine, result: Result) -> dict[str, object]:
    """As JSON, what the forwards of a result moved; empty where all experts are in memory. A
    simulated cache has no stalls: both are None."""
    store = engine.model.cached_store
    if store is None or result.traffic is None:
        return {}
    document = {"slots": store.capacity, **result.traffic.to_dict()}
    if isinstance(store, SimulatedCacheStore):
        document |= {"stall_seconds": None, "stalled": None}
    return {"expert_traffic": document}


def precision_document(engine: Engine) -> dict[str, object]:
    """As JSON, the share of the votes served in each precision, over layers and forwards so far;
    empty with one precision. Both losses are None where a manifest has no quantization errors."""
    store = engine.model.cached_store
    if not isinstance(store, MixedPrecisionStore):
        return {}
    stats = store.precision_stats
    document = {
        "fine": store.format_names[0],
        "coarse": store.format_names[1],
        "fine_slots": store.high_precision.capacity,
        "coarse_slots": store.low_precision.capacity,
        "votes_fine": stats.high_precision_share,
        "votes_coarse": 1 - stats.high_precision_share,
        "upgrades": stats.promotions,
        "loss_bound": stats.loss_bound if store.errors else None,
        "loss_rms": stats.loss_rms if store.errors else None,
    }
    return {"expert_precision": document}


def describe_traffic(traffic: Traffic) -> str:
    """The hit rate, the bytes from each tier, and the time without computation."""
    sources = (
        f"{format_bytes(transfer.bytes)} from {tier}"
        for tier, transfer in traffic.transfers.items()
    )
    stall = f", {traffic.stall_seconds:.2f} s waited" if traffic.stall_seconds else ""
    moved = " and ".join(sources) or "nothing moved"
    return f"; {traffic.hit_rate:.1%} cache hits, {moved}{stall}"
