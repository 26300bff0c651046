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

from coterie.bench.timing import settle
from coterie.engine.load import Model
from coterie.model.attention import Attention, View
from coterie.model.cache import Cache
from coterie.model.moe import Dense, FeedForward, MoE
from coterie.model.step import Step
from coterie.model.transformer import Layer
from coterie.routing.select import Ruled, Ruling
from coterie.telemetry import Recorder, Row
from coterie.values import Demand, Policy, Routing, Scores, Slab, Store

ATTENTION = "attention"
EXPERTS = "experts"
GATE = "gate and routing"
ELECTION = "election"
SHARED = "shared expert"
DENSE = "dense layers"
NORMS = "norms and sums"
COUNTING = "counting"
REST = "the rest"  # embedding, head, choosing words
PARTS = (EXPERTS, GATE, ELECTION, SHARED, ATTENTION, DENSE, NORMS, COUNTING, REST)


@dataclass(eq=False)  # not frozen: it runs; equal to itself alone
class Stopwatch:
    """Seconds of every part since ``laps`` was last emptied."""

    device: torch.device
    laps: dict[str, float] = field(default_factory=dict)
    _inside: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._turn()
        self._inside.append(part)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def _turn(self) -> None:
        """Give what has passed to the part that is running."""
        settle(self.device)
        now = time.perf_counter()
        if self._inside:
            part = self._inside[-1]
            self.laps[part] = self.laps.get(part, 0.0) + now - self._since
        self._since = now


def timed(model: Model, watch: Stopwatch) -> Model:
    """The same model over the same weights, its parts in wrappers.

    ``mc-moe`` cannot run on it: it asks for importance, which only an unwrapped layer gives.
    """
    layers = tuple(_layer(layer, watch) for layer in model.transformer.layers)
    return replace(model, transformer=replace(model.transformer, layers=layers))


def _layer(layer: Layer, watch: Stopwatch) -> Layer:
    # A wrapper stands in for what it wraps: it is called alike, and that is all that is asked.
    attention = cast("Attention", _TimedAttention(layer.attention, watch))
    inner = replace(layer, attention=attention, feed_forward=_feed_forward(layer, watch))
    return cast("Layer", _TimedLayer(inner, watch))


def _feed_forward(layer: Layer, watch: Stopwatch) -> FeedForward:
    half = layer.feed_forward
    if not isinstance(half, MoE):
        return _TimedDense(half, watch)
    shared = None if half.shared is None else cast("Dense", _TimedShared(half.shared, watch))
    return _TimedMoE(replace(half, store=_TimedStore(half.store, watch), shared=shared), watch)


@dataclass(frozen=True)
class _TimedLayer:
    inner: Layer
    watch: Stopwatch

    def __call__(self, x: Tensor, view: View, step: Step) -> Tensor:
        with self.watch(NORMS):
            return self.inner(x, view, step)


@dataclass(frozen=True)
class _TimedAttention:
    inner: Attention
    watch: Stopwatch

    def __call__(
        self, x: Tensor, view: View, cache: Cache | None, *, weigh: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        with self.watch(ATTENTION):
            return self.inner(x, view, cache, weigh=weigh)


@dataclass(frozen=True)
class _TimedDense:
    inner: FeedForward
    watch: Stopwatch

    def __call__(self, x: Tensor, step: Step, importance: Tensor | None) -> Tensor:
        with self.watch(DENSE):
            return self.inner(x, step, importance)


@dataclass(frozen=True)
class _TimedMoE:
    """Gate and routing are what is left of the layer once its other parts are taken off."""

    inner: MoE
    watch: Stopwatch

    def __call__(self, x: Tensor, step: Step, importance: Tensor | None) -> Tensor:
        policy = _TimedPolicy(step.policy, self.watch)
        recorder = _TimedRecorder(step.recorder, self.watch)
        with self.watch(GATE):
            return self.inner(x, replace(step, policy=policy, recorder=recorder), importance)


@dataclass(frozen=True)
class _TimedShared:
    inner: Dense
    watch: Stopwatch

    def apply(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        with self.watch(SHARED):
            return self.inner.apply(x, beside)


@dataclass(frozen=True)
class _TimedStore:
    """What is done with a slab happens between two turns of the loop that takes it."""

    inner: Store
    watch: Stopwatch

    def serve(self, layer: int, demand: Demand) -> Iterator[Slab]:
        for slab in self.inner.serve(layer, demand):
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

    def ruling(self, scores: Scores, k: int) -> Ruling | None:
        # What a kernel elects by is told here; that it elects is part of gate and routing.
        with self.watch(ELECTION):
            return self.inner.ruling(scores, k) if isinstance(self.inner, Ruled) else None


@dataclass(frozen=True)
class _TimedRecorder:
    inner: Recorder
    watch: Stopwatch

    def began(self, rows: tuple[Row, ...]) -> None:
        self.inner.began(rows)

    def fed(self, layer: int, x: Tensor) -> None:
        with self.watch(COUNTING):
            self.inner.fed(layer, x)

    def routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        with self.watch(COUNTING):
            self.inner.routed(layer, scores, routing)

    def layer_output(self, layer: int, x: Tensor) -> None:
        self.inner.layer_output(layer, x)
