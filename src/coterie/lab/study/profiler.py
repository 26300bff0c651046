"""A model whose parts tell how long they took: the product's own code, each part in a wrapper.

Time is exclusive: while an inner part runs, the outer one's clock stands. So the parts of a
forward add up to the whole of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from coterie.lab.bench.timing import wait_until_idle
from coterie.loading.load import Model
from coterie.model.attention import Attention, AttentionMetadata
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import Dense, FeedForward, MoE
from coterie.model.transformer import TransformerLayer
from coterie.routing.router import KernelPolicy, KernelRouting
from coterie.telemetry import Recorder, RowId
from coterie.values import ExpertRequest, ExpertStore, Policy, Routing, Scores, Slab

ATTENTION = "attention"
EXPERTS = "experts"
GATE = "gate and routing"
ELECTION = "election"
SHARED = "shared expert"
DENSE = "dense layers"
NORMS = "norms and sums"
COUNTING = "counting"
OTHER = "the rest"  # embedding, head, choosing words
PARTS = (EXPERTS, GATE, ELECTION, SHARED, ATTENTION, DENSE, NORMS, COUNTING, OTHER)


@dataclass(eq=False)  # not frozen: it runs; equal to itself alone
class Stopwatch:
    """Seconds of every part since ``laps`` was last emptied."""

    device: torch.device
    laps: dict[str, float] = field(default_factory=dict)
    _active_parts: list[str] = field(default_factory=list)
    _last_time: float = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._charge_elapsed()
        self._active_parts.append(part)
        try:
            yield
        finally:
            self._charge_elapsed()
            self._active_parts.pop()

    def _charge_elapsed(self) -> None:
        """Give what has passed to the part that is running."""
        wait_until_idle(self.device)
        now = time.perf_counter()
        if self._active_parts:
            part = self._active_parts[-1]
            self.laps[part] = self.laps.get(part, 0.0) + now - self._last_time
        self._last_time = now


def timed_model(model: Model, stopwatch: Stopwatch) -> Model:
    """The same model over the same weights, its parts in wrappers.

    ``mc-moe`` cannot run on it: it asks for importance, which only an unwrapped layer gives.
    """
    layers = tuple(_timed_layer(layer, stopwatch) for layer in model.transformer.layers)
    return replace(model, transformer=replace(model.transformer, layers=layers))


def _timed_layer(layer: TransformerLayer, stopwatch: Stopwatch) -> TransformerLayer:
    # A wrapper stands in for what it wraps: it is called alike, and that is all that is asked.
    attention = cast("Attention", _TimedAttention(layer.attention, stopwatch))
    inner = replace(layer, attention=attention, feed_forward=_timed_feed_forward(layer, stopwatch))
    return cast("TransformerLayer", _TimedLayer(inner, stopwatch))


def _timed_feed_forward(layer: TransformerLayer, stopwatch: Stopwatch) -> FeedForward:
    feed_forward = layer.feed_forward
    if not isinstance(feed_forward, MoE):
        return _TimedDense(feed_forward, stopwatch)
    shared = (
        None
        if feed_forward.shared is None
        else cast("Dense", _TimedShared(feed_forward.shared, stopwatch))
    )
    return _TimedMoE(
        replace(feed_forward, store=_TimedStore(feed_forward.store, stopwatch), shared=shared),
        stopwatch,
    )


@dataclass(frozen=True)
class _TimedLayer:
    inner: TransformerLayer
    watch: Stopwatch

    def __call__(self, x: Tensor, metadata: AttentionMetadata, context: ForwardContext) -> Tensor:
        with self.watch(NORMS):
            return self.inner(x, metadata, context)


@dataclass(frozen=True)
class _TimedAttention:
    inner: Attention
    watch: Stopwatch

    def __call__(
        self, x: Tensor, metadata: AttentionMetadata, cache: KVCache | None, *, weigh: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        with self.watch(ATTENTION):
            return self.inner(x, metadata, cache, return_received=weigh)


@dataclass(frozen=True)
class _TimedDense:
    inner: FeedForward
    watch: Stopwatch

    def __call__(self, x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor:
        with self.watch(DENSE):
            return self.inner(x, context, importance)


@dataclass(frozen=True)
class _TimedMoE:
    """Gate and routing are what is left of the layer once its other parts are taken off."""

    inner: MoE
    watch: Stopwatch

    def __call__(self, x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor:
        policy = _TimedPolicy(context.policy, self.watch)
        recorder = _TimedRecorder(context.recorder, self.watch)
        with self.watch(GATE):
            return self.inner(x, replace(context, policy=policy, recorder=recorder), importance)


@dataclass(frozen=True)
class _TimedShared:
    inner: Dense
    watch: Stopwatch

    def apply(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        with self.watch(SHARED):
            return self.inner.apply(x, residual)


@dataclass(frozen=True)
class _TimedStore:
    """What is done with a slab happens between two turns of the loop that takes it."""

    inner: ExpertStore
    watch: Stopwatch

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        for slab in self.inner.serve(layer, request):
            with self.watch(EXPERTS):
                yield slab

    def resident(self, layer: int) -> Tensor | None:
        return self.inner.resident(layer)

    def slots(self, layer: int) -> int | None:
        return self.inner.slots(layer)


@dataclass(frozen=True)
class _TimedPolicy:
    inner: Policy
    watch: Stopwatch

    def eligible(self, scores: Scores, k: int) -> Tensor:
        with self.watch(ELECTION):
            return self.inner.eligible(scores, k)

    def kernel_rule(self, scores: Scores, k: int) -> KernelRouting | None:
        # What a kernel elects by is told here; that it elects is part of gate and routing.
        with self.watch(ELECTION):
            return (
                self.inner.kernel_rule(scores, k) if isinstance(self.inner, KernelPolicy) else None
            )


@dataclass(frozen=True)
class _TimedRecorder(Recorder):
    inner: Recorder
    watch: Stopwatch

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        self.inner.on_forward(rows)

    def on_moe_input(self, layer: int, x: Tensor) -> None:
        with self.watch(COUNTING):
            self.inner.on_moe_input(layer, x)

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        with self.watch(COUNTING):
            self.inner.on_routed(layer, scores, routing)

    def on_layer_output(self, layer: int, x: Tensor) -> None:
        self.inner.on_layer_output(layer, x)
