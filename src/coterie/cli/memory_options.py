"""The options that say which experts are kept in memory: read, and told what they came to."""

from __future__ import annotations

from pathlib import Path

from coterie.cli import options as o
from coterie.cli.tables import format_bytes
from coterie.errors import CoterieError
from coterie.lab.replay.cache_simulation import TraceVotes as Remembered
from coterie.lab.replay.trace import is_trace, read_trace
from coterie.loading.expert_memory import ExpertMemoryConfig, ExpertMemoryPlan
from coterie.loading.low_precision import LowPrecisionExperts
from coterie.loading.saved_votes import SavedVotes, read_votes
from coterie.offload.mixed_precision_store import MixedPrecisionStore


def expert_memory_config(
    *,
    expert_memory: o.ExpertMemory = None,
    simulated_memory: o.SimulatedExpertMemory = None,
    host_memory: o.HostMemory = None,
    eviction: o.Eviction = None,
    warm_start: o.WarmStart = None,
    fallback_model: o.FallbackModel = None,
    precision_policy: o.PrecisionPolicy = None,
    cpu_experts: o.CpuExperts = None,
) -> ExpertMemoryConfig | None:
    """What the group of options asks for; None where all experts are to be in memory. Raises for
    what would have no effect."""
    if expert_memory is not None and simulated_memory is not None:
        raise CoterieError("--imagine-memory stands in place of --expert-memory; give one of them")
    capacity = simulated_memory if expert_memory is None else expert_memory
    if capacity is not None:
        return ExpertMemoryConfig.parse(
            capacity,
            host_memory=host_memory,
            eviction=eviction,
            warm_start=None if warm_start is None else load_votes(warm_start),
            fallback_model=low_precision_experts(fallback_model, precision_policy),
            cpu_experts=cpu_experts,
            simulated=simulated_memory is not None,
        )
    dependent_options = {
        "--host-memory": host_memory, "--eviction": eviction, "--warm": warm_start, "--coarse": fallback_model,
        "--placement": precision_policy, "--cpu-experts": cpu_experts,
    }  # fmt: skip
    ignored = [flag for flag, value in dependent_options.items() if value is not None]
    if ignored:
        raise CoterieError(
            f"{ignored[0]} has no effect where all experts are in memory; --expert-memory 35% keeps "
            "fewer there, --imagine-memory 35% acts as if"
        )
    return None


def resolve_batch_size(
    batch_size: int | None, memory: ExpertMemoryConfig | None, default: int
) -> int:
    """Together as many as were asked for, or the ``usual``; one by one where memory is short."""
    if memory is None:
        return default if batch_size is None else batch_size
    if batch_size not in (None, 1):
        raise CoterieError(
            f"--rows {batch_size}: where not all experts are in memory, prompts run one by one, so that "
            "no answer depends on who is beside it; leave --rows out"
        )
    return 1


def low_precision_experts(
    folder: str | None, precision_policy: str | None
) -> LowPrecisionExperts | None:
    """Raises for a placement that would have no effect."""
    if folder is not None:
        return LowPrecisionExperts.parse(folder, precision_policy)
    if precision_policy is not None:
        raise CoterieError(
            "--placement has no effect without --coarse FOLDER, the same model in fewer bits"
        )
    return None


def load_votes(path: Path) -> SavedVotes:
    """From a file of votes, or from the forwards of a trace."""
    if not is_trace(path):
        return read_votes(path)
    trace = read_trace(path)
    return SavedVotes.of(trace.header.model, trace.header.layers, Remembered.of(trace).mean_votes)


def describe_mixed_precision(store: MixedPrecisionStore, layers: int) -> str:
    """How many experts are in memory in either precision; and what its manifests do not tell."""
    high, low = store.high_precision, store.low_precision
    sizes = (high.capacity * high.expert_bytes, low.capacity * low.expert_bytes)
    on_disk = (
        "" if store.capacity >= low.experts else f", the others on disk in {store.format_names[1]}"
    )
    unknown_error = (
        "" if store.errors else "; a manifest does not tell what its experts lost: no bound"
    )
    return (
        f"{high.capacity} of {low.experts} experts a layer in {store.format_names[0]} and "
        f"{low.capacity} in {store.format_names[1]} in memory ({format_bytes(sum(sizes) * layers)})"
        f"{on_disk}{unknown_error}"
    )


def describe_memory_plan(plan: ExpertMemoryPlan) -> str:
    """How many experts are in memory, and why so many where "auto" chose."""
    auto_note = ""
    if plan.free_bytes is not None and plan.other_bytes is not None:
        auto_note = f"{format_bytes(plan.free_bytes)} are free, {format_bytes(plan.other_bytes)} kept for all else: "
    if plan.holds_all:
        return (
            f"{auto_note}all {plan.experts} experts a layer fit ({format_bytes(plan.slot_bytes)})"
        )
    count = f"{plan.slots} of" if plan.absent_bytes else "all"
    resident = f"{auto_note}{count} {plan.experts} experts a layer in memory "
    if plan.config.simulated:
        return f"{resident}({format_bytes(plan.slot_bytes)}), as is imagined: all are there"
    if plan.host_bytes is None:
        return f"{resident}({format_bytes(plan.slot_bytes)})" + ", the others on disk" * bool(
            plan.absent_bytes
        )
    all_bytes = plan.layers * plan.experts * plan.expert_bytes
    others = "all" if plan.host_bytes >= all_bytes else "some before the disk"
    host_note = f"{others} in {format_bytes(plan.host_bytes)} of the host"
    return f"{resident}of the GPU ({format_bytes(plan.slot_bytes)}), {host_note}"
