"""The options that say which experts are kept in memory: read, and told what they came to."""

from __future__ import annotations

from pathlib import Path

from coterie.cli import options as o
from coterie.errors import CoterieError
from coterie.lab.replay.cache_simulation import TraceVotes as Remembered
from coterie.lab.replay.trace import is_trace, read_trace
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.low_precision import LowPrecisionExperts
from coterie.loading.saved_votes import SavedVotes, read_votes


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
