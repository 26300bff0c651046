"""Forwards that a GPU keeps and plays again: between two layers nothing waits for Python.

Of a kind of forward (its rows, width, policy, how far it sees) the first is run as usual, the
second is captured, and from then on what changes is copied into place and the capture replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.experts.store import Resident
from coterie.model.cache import Cache
from coterie.model.moe import MoE
from coterie.model.step import Step
from coterie.model.transformer import Transformer
from coterie.routing import POLICIES, Election, needs_importance, spell
from coterie.telemetry import Counting, Row
from coterie.values import Policy, Progress, Window

Outcome = tuple[Tensor, Counting]
Capture = Callable[[Callable[[], Outcome]], tuple[Outcome, Callable[[], object]]]
"""Of work whose inputs stay in place: what it gives, in place too, and what does it again."""

REACH = 256  # keys are looked at in multiples of this, so that a longer row is rarely a new kind
MOST = 32  # kinds kept at once
ALIGNED = 64  # bytes that every input begins at a multiple of


class Captured:
    """By CUDA graphs, which share the memory in which they work.

    So one at a time may be played, and what it gave stands until then.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], object]]:
        """Raises RuntimeError where something in ``work`` asks the host."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outcome = work()
        return outcome, graph.replay


@dataclass(frozen=True)
class Inputs:
    """Named tensors in one run of memory, on the host and on the device: one copy moves them."""

    host: Tensor  # [bytes] uint8, where the device can fetch it by itself
    device: Tensor
    shown: Mapping[str, Tensor]  # views of the host's
    placed: Mapping[str, Tensor]  # views of the device's

    @staticmethod
    def like(tensors: Mapping[str, Tensor], device: torch.device) -> Inputs:
        starts, size = {}, 0
        for name, tensor in tensors.items():
            starts[name] = size
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        there = torch.zeros(size, dtype=torch.uint8, device=device)

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: memory[starts[name] : starts[name] + tensor.nbytes]
                .view(tensor.dtype)
                .view(tensor.shape)
                for name, tensor in tensors.items()
            }

        return Inputs(host, there, views(host), views(there))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take new values. The last ones must have been used: who read a result knows that."""
        for name, tensor in tensors.items():
            self.shown[name].copy_(tensor)
        self.device.copy_(self.host, non_blocking=True)


@dataclass  # not frozen: the second time it is captured
class Kept:
    """One kind of forward."""

    inputs: Inputs
    work: Callable[[], Outcome]
    outcome: Outcome | None = None
    replay: Callable[[], object] | None = None


class Graphs:
    """The kinds of forward of one transformer. What ``run`` gives stands until it is called again.

    A capture that fails is said once; forwards of its policy then run as if there were no graphs.
    """

    def __init__(self, transformer: Transformer, capture: Capture | None = None) -> None:
        self._transformer = transformer
        self._capture = capture or Captured()
        self._kept: dict[tuple[object, ...], Kept] = {}
        self._cache: Cache | None = None
        self._able = _resident(transformer)
        self._failed: set[Policy] = set()

    def takes(self, step: Step) -> bool:
        """Whether such forwards can be played again: nothing in them follows the host, and no
        coreset is kept from one to the next."""
        return self._able and step.coresets is None and follows_no_host(step.policy)

    def run(
        self, tokens: Tensor, step: Step, places: Sequence[int], rows: tuple[Row, ...]
    ) -> Outcome:
        """Logits of a step whose tensors are on the host, but for a cache of all rows; its counts.

        ``places`` are this step's rows of the cache, ``rows`` the names that the counts go by.
        """
        changing = _changing(tokens, step)
        if step.cache is not None:
            changing["places"] = torch.tensor(places)
        kept = self._kind(changing, step)
        kept.inputs.fill(changing)
        if kept.outcome is None:
            kept.outcome = logits, counted = kept.work()
            return logits, counted.renewed(rows)
        if kept.replay is None and step.policy not in self._failed:
            self._keep(kept, step.policy)
        if kept.replay is None:
            logits, counted = kept.work()
            return logits, counted.renewed(rows)
        kept.replay()
        logits, counted = kept.outcome
        return logits, counted.renewed(rows)

    def _kind(self, changing: Mapping[str, Tensor], step: Step) -> Kept:
        if step.cache is not None and step.cache is not self._cache:
            self._kept.clear()  # they know where the old one lies; let its memory go too
            self._cache = step.cache
        shapes = tuple((name, tensor.shape) for name, tensor in changing.items())
        reach = 0 if step.cache is None else _reach(step.cache, step.window)
        key = (step.policy, step.window.block, reach, shapes)
        if key not in self._kept:
            while len(self._kept) >= MOST:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._new(changing, step, reach)
        return self._kept[key]

    def _new(self, changing: Mapping[str, Tensor], step: Step, reach: int) -> Kept:
        if step.cache is not None:
            step = replace(step, cache=_trimmed(step.cache, reach))
        inputs = Inputs.like(changing, self._transformer.device)
        tokens, placed = _placed(inputs.placed, step)

        def work() -> Outcome:
            counted = Counting()
            counted.began(tuple(range(len(tokens))))
            logits = self._transformer(tokens, replace(placed, recorder=counted))
            counted.began(())
            return logits, counted

        return Kept(inputs, work)

    def _keep(self, kept: Kept, policy: Policy) -> None:
        device = self._transformer.device
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with current:
                kept.outcome, kept.replay = self._capture(kept.work)
        except RuntimeError as error:
            self._failed.add(policy)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logging.getLogger("coterie").warning(
                "No CUDA graph: a forward under %s could not be captured (%s); its layers are "
                "launched one by one",
                spell(policy),
                reason,
            )


def follows_no_host(policy: Policy) -> bool:
    """Whether a policy is ours and its choices follow from tensors alone, without weighing keys.

    Lots are drawn by the host, and where seats are taken one by one the host is asked how many.
    """
    election = vars(policy).get("election")
    if isinstance(election, Election) and (
        election.vote == "random" or election.tally == "proportional"
    ):
        return False
    return type(policy) in POLICIES.values() and not needs_importance(policy)


def _resident(transformer: Transformer) -> bool:
    stores = (
        layer.feed_forward.store
        for layer in transformer.layers
        if isinstance(layer.feed_forward, MoE)
    )
    return all(isinstance(store, Resident) for store in stores)


def _reach(cache: Cache, window: Window) -> int:
    """How far the window sees, rounded up."""
    return min(cache.length, -(-int(window.visible.max()) // REACH) * REACH)


def _trimmed(cache: Cache, reach: int) -> Cache:
    """Its first positions."""
    keys, values = (tuple(t[:, :, :reach] for t in held) for held in (cache.keys, cache.values))
    return Cache(keys, values, cache.chosen)


def _changing(tokens: Tensor, step: Step) -> dict[str, Tensor]:
    """By name, the tensors that change from forward to forward."""
    progress = step.progress or Progress()
    found = {
        "tokens": tokens,
        "start": step.window.start,
        "visible": step.window.visible,
        "wanted": step.wanted,
        "voters": step.voters,
        **{f"progress {name}": value for name, value in vars(progress).items()},
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _placed(placed: Mapping[str, Tensor], step: Step) -> tuple[Tensor, Step]:
    """The tokens and the step again, reading the tensors in their places."""
    window = Window(placed["start"], step.window.width, placed["visible"], step.window.block)
    progress = None
    if step.progress is not None:
        names = vars(step.progress)
        progress = Progress(**{name: placed.get(f"progress {name}") for name in names})
    cache = None if step.cache is None else replace(step.cache, chosen=placed["places"])
    return placed["tokens"], replace(
        step,
        window=window,
        cache=cache,
        wanted=placed.get("wanted"),
        voters=placed.get("voters"),
        progress=progress,
    )
