"""The memory for experts: its options, and notes that say which experts are in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coterie.cli.output import format_bytes
from coterie.errors import ConfigError
from coterie.lab.replay.cache_simulation import TraceVotes
from coterie.lab.replay.trace import is_trace, read_trace
from coterie.loading.cpu_experts import describe_cpu_experts
from coterie.loading.expert_memory import ExpertMemoryConfig, ExpertMemoryPlan
from coterie.loading.load import Model
from coterie.loading.low_precision import LowPrecisionExperts
from coterie.loading.saved_votes import SavedVotes, read_votes
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.mixed_precision_store import MixedPrecisionStore


def memory_config(
    expert_memory: str | None,
    simulate_expert_memory: str | None,
    *,
    host_memory: str | None = None,
    eviction: str | None = None,
    warm_start: Path | None = None,
    fallback_model: str | None = None,
    precision_policy: str | None = None,
    cpu_experts: str | None = None,
) -> ExpertMemoryConfig | None:
    """The memory for experts; None where all are in memory. Raises for options without effect."""
    if expert_memory is not None and simulate_expert_memory is not None:
        raise ConfigError("--simulate-expert-memory replaces --expert-memory; give one of them")
    if fallback_model is None and precision_policy is not None:
        raise ConfigError("--precision-policy has no effect without --fallback-model FOLDER")
    capacity = simulate_expert_memory if expert_memory is None else expert_memory
    if capacity is not None:
        low_precision = (
            None
            if fallback_model is None
            else LowPrecisionExperts.parse(fallback_model, precision_policy)
        )
        return ExpertMemoryConfig.parse(
            capacity,
            host_memory=host_memory,
            eviction=eviction,
            warm_start=None if warm_start is None else load_votes(warm_start),
            fallback_model=low_precision,
            cpu_experts=cpu_experts,
            simulated=simulate_expert_memory is not None,
        )
    dependent_options = {
        "--host-memory": host_memory, "--eviction": eviction, "--warm-start": warm_start,
        "--fallback-model": fallback_model, "--cpu-experts": cpu_experts,
    }  # fmt: skip
    for flag, value in dependent_options.items():
        if value is not None:
            raise ConfigError(
                f"{flag} has no effect where all experts are in memory; --expert-memory 35% keeps "
                "fewer, --simulate-expert-memory 35% simulates that"
            )
    return None


def load_votes(path: Path) -> SavedVotes:
    """The votes of a file of votes, or the mean votes of a trace."""
    if not is_trace(path):
        return read_votes(path)
    trace = read_trace(path)
    return SavedVotes.of(trace.header.model, trace.header.layers, TraceVotes.of(trace).mean_votes)


def memory_notes(model: Model) -> Iterator[str]:
    """What the memory for experts of a loaded model holds."""
    store = model.cached_store
    if isinstance(store, MixedPrecisionStore):
        yield describe_mixed_precision(store, len(model.spec.moe_layers))
    elif model.memory_plan is not None:
        yield describe_memory_plan(model.memory_plan)
    if isinstance(store, CachedExpertStore) and store.cpu_experts is not None:
        yield describe_cpu_experts(store.cpu_experts)


def describe_mixed_precision(store: MixedPrecisionStore, layers: int) -> str:
    """How many experts are in memory in either precision."""
    high, low = store.high_precision, store.low_precision
    high_format, low_format = store.format_names
    slot_bytes = high.capacity * high.expert_bytes + low.capacity * low.expert_bytes
    on_disk = "" if store.capacity >= low.experts else f", the others on disk in {low_format}"
    no_bound = "" if store.errors else "; a manifest without quantization errors: no error bound"
    return (
        f"{high.capacity} of {low.experts} experts a layer in {high_format} and {low.capacity} in "
        f"{low_format} in memory ({format_bytes(slot_bytes * layers)}){on_disk}{no_bound}"
    )


def describe_memory_plan(plan: ExpertMemoryPlan) -> str:
    """How many experts are in memory, and why so many where "auto" decided."""
    auto_note = ""
    if plan.free_bytes is not None and plan.other_bytes is not None:
        free, other = format_bytes(plan.free_bytes), format_bytes(plan.other_bytes)
        auto_note = f"{free} are free, {other} kept for all else: "
    size = format_bytes(plan.slot_bytes)
    if plan.holds_all:
        return f"{auto_note}all {plan.experts} experts a layer fit ({size})"
    count = f"{plan.slots} of" if plan.absent_bytes else "all"
    resident = f"{auto_note}{count} {plan.experts} experts a layer in memory"
    if plan.config.simulated:
        return f"{resident} ({size}) in the simulation; in fact all are"
    if plan.host_bytes is None:
        return f"{resident} ({size})" + ", the others on disk" * bool(plan.absent_bytes)
    all_bytes = plan.layers * plan.experts * plan.expert_bytes
    others = "all" if plan.host_bytes >= all_bytes else "some, before the disk,"
    return (
        f"{resident} of the GPU ({size}), {others} in {format_bytes(plan.host_bytes)} of the host"
    )
