"""What the measurement of experts that do not fit is made of: who watches copies, and who sums."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coterie import ops
from coterie.model.moe import MoE
from coterie.model.transformer import Transformer
from coterie.offload.fetchers import ExpertFetcher
from coterie.values import ExpertRequest, ExpertStore, Routing, Slab

Mark = torch.cuda.Event | float
"""A moment of the queue of copies; where there is none, of the clock."""


@dataclass
class Watched:
    """A courier whose copies' time is told: from when the first could begin to the last's end."""

    courier: ExpertFetcher
    queue: torch.cuda.Stream | None  # of the copies; None where threads read
    brought: int = 0
    _first: Mark | None = None
    _spans: list[tuple[Mark, Mark]] = field(default_factory=list)

    @property
    def waited(self) -> float:
        return self.courier.stall_seconds

    def fetch_async(self, layer: int, expert: int, into: Tensor) -> Future[str]:
        self.brought += 1
        if self._first is None:
            self._first = self._mark()
        return self.courier.fetch_async(layer, expert, into)

    def wait(self, coming: Collection[Future[str]]) -> None:
        self.courier.wait(coming)
        if self._first is not None:
            self._spans.append((self._first, self._mark()))
            self._first = None

    def mark_computed(self) -> None:
        self.courier.mark_computed()

    def settle(self, coming: Collection[Future[str]]) -> None:
        self.courier.drain(coming)

    def to_device(self, table: np.ndarray) -> Tensor:
        return self.courier.to_device(table)

    def busy(self) -> float:
        """Seconds in which experts were on the way; everything must have been waited for."""
        return sum(_between(*span) for span in self._spans)

    def _mark(self) -> Mark:
        if self.queue is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.queue)
        return event


@dataclass(frozen=True)
class Ran:
    """What the forwards of a trace took, layers of experts alone."""

    seconds: tuple[float, ...]  # of each forward
    used: int  # experts, of all layers and forwards
    brought: int
    aside: int
    stalled: float
    busy: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Nobody:
    """A store without experts: what a forward takes beside them."""

    def serve(self, layer: int, demand: ExpertRequest) -> Iterator[Slab]:
        del layer, demand
        return iter(())

    def resident(self, layer: int) -> Tensor | None:
        del layer
        return None

    def slots(self, layer: int) -> int | None:
        del layer
        return None


def summed(store: ExpertStore, layer: int, routing: Routing, x: Tensor) -> Tensor:
    """What a layer's experts say, slab by slab."""
    out: Tensor | None = None
    for slab in store.serve(layer, ExpertRequest(routing.used, routing)):
        part = ops.run_experts(x, routing, slab)
        out = part if out is None else out.add_(part)
    assert out is not None
    return out


def on(routing: Routing, device: torch.device) -> Routing:
    """The same there."""
    ids, weights, used, own = (
        one.to(device)
        for one in (routing.topk_ids, routing.topk_weights, routing.used, routing.vanilla_ids)
    )
    return Routing(ids, weights, used, own)


def slabs_of(transformer: Transformer) -> Iterator[Slab]:
    """All experts of each layer that has some."""
    nobody = ExpertRequest(torch.zeros(transformer.spec.router.experts, dtype=torch.bool))
    for number, layer in enumerate(transformer.layers):
        if isinstance(layer.feed_forward, MoE):
            yield from layer.feed_forward.store.serve(number, nobody)


def _between(first: Mark, last: Mark) -> float:
    if isinstance(first, float):
        return last - first
    return first.elapsed_time(last) / 1e3
