"""A trace served by a real expert store: the experts of its replay, loaded and computed.

Routing and votes are the trace's, so weights can be random; the computed values are discarded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie import ops
from coterie.errors import ConfigError
from coterie.lab.replay.cache_simulation import (
    CoresetHistory,
    CountArray,
    ReplayPolicy,
    TraceVotes,
    recorded_experts,
)
from coterie.lab.replay.policies import select_from_trace
from coterie.lab.replay.trace import Mask, Trace, TraceForward
from coterie.offload.store import TrackedExpertStore
from coterie.values import ExpertRequest, Routing


@dataclass(frozen=True)
class ServedTrace:
    """Experts used and loaded and seconds taken by each forward and layer, [P, L]."""

    used: CountArray
    loads: CountArray
    seconds: NDArray[np.float64]
    stall_seconds: float  # of all forwards


def serve_trace(
    trace: Trace, replay_policy: ReplayPolicy, store: TrackedExpertStore, x: Tensor
) -> ServedTrace:
    """Serve a trace of single rows of N tokens; ``x`` [N, H] is the input of each layer.

    Only serving and computing experts is timed. Raises ConfigError for other traces.
    """
    if any(len(rows) > 1 for rows in TraceVotes.of(trace).passes):
        raise ConfigError("rows of this trace share forwards; record one row at a time")
    if (widths := {forward.tokens for forward in trace.forwards}) != {len(x)}:
        raise ConfigError(f"forwards of {sorted(widths)} tokens cannot compute {len(x)}")
    rng, columns = torch.Generator().manual_seed(0), []
    stall = store_counters(store)[1]
    for forward, coresets in elections(trace, replay_policy, store):
        for ordinal, layer in enumerate(trace.header.layers):
            routing = routing_from_trace(forward, ordinal, coresets[ordinal], rng)
            loads, start = store_counters(store)[0], time.perf_counter()
            for slab in store.serve(layer, ExpertRequest(routing.used, routing)):
                ops.run_experts(x, routing, slab)
            seconds = time.perf_counter() - start
            columns.append((coresets[ordinal].sum(), store_counters(store)[0] - loads, seconds))
    shape = (len(trace.forwards), len(trace.header.layers))
    used, moved, times = (np.array(c).reshape(shape) for c in zip(*columns, strict=True))
    return ServedTrace(used, moved, times, store_counters(store)[1] - stall)


def elections(
    trace: Trace, replay_policy: ReplayPolicy, store: TrackedExpertStore
) -> Iterator[tuple[TraceForward, Mask]]:
    """Each forward and its experts [L, E]; the caller serves them before it asks for the next."""
    votes, history = TraceVotes.of(trace).votes, CoresetHistory(replay_policy.reuse_tolerance)
    for index, forward in enumerate(trace.forwards):
        selected = recorded_experts([forward])[0]
        for ordinal, layer in enumerate(
            trace.header.layers if replay_policy.routes(forward) else ()
        ):
            mask = store.resident(layer)
            resident = None if mask is None else mask.cpu().numpy()
            selected[ordinal] = select_from_trace(
                *(trace, replay_policy.policy, [forward], ordinal, resident),
                slots=store.capacity,
            )[0]
        yield forward, history.reuse(forward, selected, votes[index])


def routing_from_trace(
    forward: TraceForward, ordinal: int, coreset: Mask, rng: torch.Generator
) -> Routing:
    """Each token takes its top-k experts in the coreset, then random ones of it.

    A trace does not show the latter. An id is -1 where the coreset is smaller than k.
    """
    vanilla_ids = torch.from_numpy(forward.vanilla_ids[ordinal].astype(np.int64))
    used = torch.from_numpy(coreset)
    priority = torch.rand(len(vanilla_ids), len(coreset), generator=rng)
    priority.scatter_add_(1, vanilla_ids, torch.ones(vanilla_ids.shape)).masked_fill_(~used, -1.0)
    best = priority.topk(vanilla_ids.shape[1])
    ids = best.indices.where(best.values >= 0, -1)
    weights = torch.full(ids.shape, 1.0 / vanilla_ids.shape[1]).masked_fill_(ids < 0, 0.0)
    return Routing(ids, weights, used, vanilla_ids)


def store_counters(store: TrackedExpertStore) -> tuple[int, float]:
    """Experts moved and seconds stalled so far; 0 for a store without a cache."""
    if store.traffic_log is None:
        return 0, 0.0
    traffic = store.traffic_log.traffic()
    return traffic.experts_moved, traffic.stall_seconds
