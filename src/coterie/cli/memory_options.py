"""The memory for experts, from its options."""

from __future__ import annotations

from pathlib import Path

from coterie.errors import ConfigError
from coterie.lab.replay.cache_simulation import TraceVotes
from coterie.lab.replay.trace import is_trace, read_trace
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.low_precision import LowPrecisionExperts
from coterie.loading.saved_votes import SavedVotes, read_votes


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
