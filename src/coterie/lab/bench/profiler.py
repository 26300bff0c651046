"""A model with timed parts: the model's own code, each part in a wrapper.

Times are exclusive: the outer part's clock stops while an inner part runs. The parts of a forward
therefore add up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from coterie.lab.timing import wait_until_idle
from coterie.loading.load import Model
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import FeedForward, MoE
from coterie.model.transformer import Layer, ParallelLayer
from coterie.routing.router import KernelPolicy, KernelRouting
from coterie.values import ExpertRequest, ExpertStore, Policy, Scores, Slab

ATTENTION = "attention"
EXPERTS = "experts"
GATE = "gate and routing"
ELECTION = "election"
SHARED = "shared expert"
DENSE = "dense layers"
NORMS = "norms and sums"
COUNTING = "counting"
OTHER = "the rest"  # embedding, head, sampling
PARTS = (EXPERTS, GATE, ELECTION, SHARED, ATTENTION, DENSE, NORMS, COUNTING, OTHER)


@dataclass(eq=False)  # mutable: it runs; equal to itself alone
class Stopwatch:
    """Seconds of every part since ``laps`` was last cleared.

    ``stopwatch(part)`` is a context manager, and a decorator of functions.
    """

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
        """Add the elapsed time to the running part."""
        wait_until_idle(self.device)
        now = time.perf_counter()
        if self._active_parts:
            part = self._active_parts[-1]
            self.laps[part] = self.laps.get(part, 0.0) + now - self._last_time
        self._last_time = now


def timed_model(model: Model, stopwatch: Stopwatch) -> Model:
    """The same model with the same weights and with timed parts.

    It cannot run ``mc-moe``, which needs the importance that only an unwrapped layer returns.
    """
    layers = tuple(_timed_layer(layer, stopwatch) for layer in model.transformer.layers)
    return replace(model, transformer=replace(model.transformer, layers=layers))


def _timed_layer(layer: Layer, stopwatch: Stopwatch) -> Layer:
    if isinstance(layer, ParallelLayer):
        layer = replace(layer, dense=_timed_methods(stopwatch, SHARED, layer.dense, "apply"))
    attention = stopwatch(ATTENTION)(layer.attention)
    feed_forward = _timed_feed_forward(layer.feed_forward, stopwatch)
    return stopwatch(NORMS)(replace(layer, attention=attention, feed_forward=feed_forward))


def _timed_feed_forward(feed_forward: FeedForward, stopwatch: Stopwatch) -> FeedForward:
    if not isinstance(feed_forward, MoE):
        return stopwatch(DENSE)(feed_forward)
    shared, store = feed_forward.shared, _timed_store(feed_forward.store, stopwatch)
    if shared is not None:
        shared = _timed_methods(stopwatch, SHARED, shared, "apply")
    inner = replace(feed_forward, store=store, shared=shared)

    # Gate and routing are the remainder of the layer after its other parts.
    @stopwatch(GATE)
    def timed_moe(x: Tensor, context: ForwardContext, importance: Tensor | None) -> Tensor:
        policy = _TimedPolicy(context.policy, stopwatch)
        names = "on_moe_input", "on_routed"
        recorder = _timed_methods(stopwatch, COUNTING, context.recorder, *names)
        return inner(x, replace(context, policy=policy, recorder=recorder), importance)

    return timed_moe


def _timed_methods(stopwatch: Stopwatch, part: str, inner: object, *names: str) -> Any:
    """An object with the methods of ``inner`` that an MoE layer calls."""
    return SimpleNamespace(**{name: stopwatch(part)(getattr(inner, name)) for name in names})


def _timed_store(store: ExpertStore, stopwatch: Stopwatch) -> Any:
    """The caller's work on a slab runs between two steps of its loop."""

    def serve(layer: int, request: ExpertRequest) -> Iterator[Slab]:
        for slab in store.serve(layer, request):
            with stopwatch(EXPERTS):
                yield slab

    return SimpleNamespace(serve=serve, resident=store.resident, capacity=store.capacity)


@dataclass(frozen=True)
class _TimedPolicy:
    inner: Policy
    watch: Stopwatch

    def eligible(self, scores: Scores, k: int) -> Tensor:
        with self.watch(ELECTION):
            return self.inner.eligible(scores, k)

    def kernel_rule(self, scores: Scores, k: int) -> KernelRouting | None:
        """The rule alone; the kernel's election counts as gate and routing."""
        inner = self.inner
        with self.watch(ELECTION):
            return inner.kernel_rule(scores, k) if isinstance(inner, KernelPolicy) else None
