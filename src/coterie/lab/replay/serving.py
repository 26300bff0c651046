"""A trace served by a store that is there: the coresets of its replay, and what they really take.

A replay keeps book of slots and foretells a clock; here the same elections ask the store itself
for their experts, and these compute. Routing and votes are the trace's, so that weights need not
mean anything; what tokens compute is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie import ops
from coterie.errors import CoterieError
from coterie.lab.replay.bit_packing import Mask
from coterie.lab.replay.cache_simulation import (
    CoresetHistory,
    ReplayPolicy,
    TraceVotes,
    recorded_experts,
)
from coterie.lab.replay.hardware_model import CountArray
from coterie.lab.replay.policies import select_from_trace
from coterie.lab.replay.trace import Trace, TraceForward
from coterie.offload.store import TrackedExpertStore, total_traffic
from coterie.values import ExpertRequest, Routing

ProgressCallback = Callable[[int], None]


@dataclass(frozen=True)
class ServedTrace:
    """What every forward and layer used, loaded and took: [P, L]; ``waited`` seconds of it all."""

    used: CountArray
    loads: CountArray
    seconds: NDArray[np.float64]
    seconds_waited: float

    @property
    def hit_rate(self) -> float:
        return 1 - float(self.loads.sum()) / float(max(1, self.used.sum()))


def serve_trace(
    trace: Trace,
    replay_policy: ReplayPolicy,
    store: TrackedExpertStore,
    x: Tensor,
    on_progress: ProgressCallback = lambda forward: None,
) -> ServedTrace:
    """Serve every forward of a trace of one row at a time; ``x`` [N, H] goes into each layer.

    Only serving and computing experts is timed, not electing them. Raises CoterieError for a trace
    whose rows share forwards, and for other widths than ``x`` has.
    """
    trace_votes = TraceVotes.of(trace)
    _check_trace(trace, trace_votes, x)
    history, rng = CoresetHistory(replay_policy.reuse_tolerance), torch.Generator().manual_seed(0)
    shape = (len(trace.forwards), len(trace.header.layers))
    used, loads = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    seconds, waited_before = np.zeros(shape), total_traffic(store).stall_seconds
    for index, forward in enumerate(trace.forwards):
        selected = _selected_experts(trace, replay_policy, forward, store)
        coresets, _, _ = history.reuse(forward, selected, trace_votes.votes[index])
        used[index] = coresets.sum(-1)
        for ordinal, layer in enumerate(trace.header.layers):
            routing = routing_from_trace(forward, ordinal, coresets[ordinal], rng)
            moved_before, start = total_traffic(store).experts_moved, time.perf_counter()
            for slab in store.serve(layer, ExpertRequest(routing.used, routing)):
                ops.run_experts(x, routing, slab)
            seconds[index, ordinal] = time.perf_counter() - start
            loads[index, ordinal] = total_traffic(store).experts_moved - moved_before
        on_progress(index)
    return ServedTrace(used, loads, seconds, total_traffic(store).stall_seconds - waited_before)


def routing_from_trace(
    forward: TraceForward, ordinal: int, coreset: Mask, rng: torch.Generator
) -> Routing:
    """Every token takes its own experts that are in the coreset, and others of it by lot: which
    these were is not in a trace. As many as it has, or -1 where the coreset is smaller."""
    vanilla_ids, used = (
        torch.from_numpy(forward.vanilla_ids[ordinal].astype(np.int64)),
        torch.from_numpy(coreset),
    )
    priority = torch.rand(len(vanilla_ids), len(coreset), generator=rng)
    priority = priority.scatter_add_(1, vanilla_ids, torch.ones(vanilla_ids.shape)).masked_fill_(
        ~used, -1.0
    )
    best = priority.topk(vanilla_ids.shape[1])
    ids = best.indices.where(best.values >= 0, -1)
    weights = torch.full(ids.shape, 1.0 / vanilla_ids.shape[1]).masked_fill_(ids < 0, 0.0)
    return Routing(ids, weights, used, vanilla_ids)


def _selected_experts(
    trace: Trace, replay_policy: ReplayPolicy, forward: TraceForward, store: TrackedExpertStore
) -> Mask:
    """[L, E]: whom a forward uses, by what the store holds before it."""
    if not replay_policy.routes(forward):
        return recorded_experts(forward)
    masks = []
    for ordinal, layer in enumerate(trace.header.layers):
        resident_mask = store.resident(layer)
        resident = None if resident_mask is None else resident_mask.numpy()
        slots = store.slots(layer)
        masks.append(
            select_from_trace(
                trace, replay_policy.policy, [forward], ordinal, resident, slots=slots
            )[0]
        )
    return np.stack(masks)


def _check_trace(trace: Trace, trace_votes: TraceVotes, x: Tensor) -> None:
    if any(len(indices) > 1 for indices in trace_votes.passes):
        raise CoterieError("rows of this trace share forwards; serve one of rows one at a time")
    widths = {forward.tokens for forward in trace.forwards}
    if widths != {len(x)}:
        raise CoterieError(f"forwards of {sorted(widths)} tokens cannot compute {len(x)}")
