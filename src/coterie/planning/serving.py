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
from coterie.experts.offload import Offloaded
from coterie.naming import CoterieError
from coterie.planning.booking import Memory, Play, Remembered, unrouted
from coterie.planning.coding import Mask
from coterie.planning.elections import elected
from coterie.planning.machine import Counts
from coterie.planning.trace import Forward, Trace
from coterie.values import Demand, Routing, Store

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Served:
    """What every forward and layer used, loaded and took: [P, L]; ``waited`` seconds of it all."""

    used: Counts
    loads: Counts
    seconds: NDArray[np.float64]
    waited: float

    @property
    def hit_rate(self) -> float:
        return 1 - float(self.loads.sum()) / float(max(1, self.used.sum()))


def serve_trace(
    trace: Trace, play: Play, store: Store, x: Tensor, tell: Tell = lambda forward: None
) -> Served:
    """Serve every forward of a trace of one row at a time; ``x`` [N, H] goes into each layer.

    Only serving and computing experts is timed, not electing them. Raises CoterieError for a trace
    whose rows share forwards, and for other widths than ``x`` has.
    """
    memory = Memory.of(trace)
    _check(trace, memory, x)
    last, draw = Remembered(play.drift), torch.Generator().manual_seed(0)
    shape = (len(trace.forwards), len(trace.about.layers))
    used, loads = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    seconds, before = np.zeros(shape), _waited(store)
    for place, forward in enumerate(trace.forwards):
        chosen = _elected(trace, play, forward, store)
        coresets, _, _ = last.settle(forward, chosen, memory.votes[place])
        used[place] = coresets.sum(-1)
        for ordinal, layer in enumerate(trace.about.layers):
            routing = routed(forward, ordinal, coresets[ordinal], draw)
            moved, began = _moved(store), time.perf_counter()
            for slab in store.serve(layer, Demand(routing.used, routing)):
                ops.run_experts(x, routing, slab)
            seconds[place, ordinal] = time.perf_counter() - began
            loads[place, ordinal] = _moved(store) - moved
        tell(place)
    return Served(used, loads, seconds, _waited(store) - before)


def routed(forward: Forward, ordinal: int, coreset: Mask, draw: torch.Generator) -> Routing:
    """Every token takes its own experts that are in the coreset, and others of it by lot: which
    these were is not in a trace. As many as it has, or -1 where the coreset is smaller."""
    own, used = torch.from_numpy(forward.ids[ordinal].astype(np.int64)), torch.from_numpy(coreset)
    wish = torch.rand(len(own), len(coreset), generator=draw)
    wish = wish.scatter_add_(1, own, torch.ones(own.shape)).masked_fill_(~used, -1.0)
    best = wish.topk(own.shape[1])
    ids = best.indices.where(best.values >= 0, -1)
    weights = torch.full(ids.shape, 1.0 / own.shape[1]).masked_fill_(ids < 0, 0.0)
    return Routing(ids, weights, used, own)


def _elected(trace: Trace, play: Play, forward: Forward, store: Store) -> Mask:
    """[L, E]: whom a forward uses, by what the store holds before it."""
    if not play.routes(forward):
        return unrouted(forward)
    found = []
    for ordinal, layer in enumerate(trace.about.layers):
        here = store.resident(layer)
        resident = None if here is None else here.numpy()
        slots = store.slots(layer)
        found.append(elected(trace, play.policy, [forward], ordinal, resident, slots=slots)[0])
    return np.stack(found)


def _check(trace: Trace, memory: Memory, x: Tensor) -> None:
    if any(len(places) > 1 for places in memory.passes):
        raise CoterieError("rows of this trace share forwards; serve one of rows one at a time")
    widths = {forward.tokens for forward in trace.forwards}
    if widths != {len(x)}:
        raise CoterieError(f"forwards of {sorted(widths)} tokens cannot compute {len(x)}")


def _moved(store: Store) -> int:
    return store.moved if isinstance(store, Offloaded) else 0


def _waited(store: Store) -> float:
    return store.waited if isinstance(store, Offloaded) else 0.0
