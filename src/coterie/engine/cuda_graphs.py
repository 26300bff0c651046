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

from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import MoE
from coterie.model.transformer import Transformer
from coterie.routing import POLICIES, Election, format_policy, needs_importance
from coterie.telemetry import ExpertCounter, RowId
from coterie.values import DecodeProgress, Policy, Window

ForwardOutput = tuple[Tensor, ExpertCounter]
CaptureFunction = Callable[
    [Callable[[], ForwardOutput]], tuple[ForwardOutput, Callable[[], object]]
]
"""Of work whose inputs stay in place: what it gives, in place too, and what does it again."""

REACH_MULTIPLE = (
    256  # keys are looked at in multiples of this, so that a longer row is rarely a new kind
)
MAX_GRAPHS = 32  # kinds kept at once
ALIGNMENT = 64  # bytes that every input begins at a multiple of


class CudaGraphCapture:
    """By CUDA graphs, which share the memory in which they work.

    So one at a time may be played, and what it gave stands until then.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, work: Callable[[], ForwardOutput]
    ) -> tuple[ForwardOutput, Callable[[], object]]:
        """Raises RuntimeError where something in ``work`` asks the host."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = work()
        return output, graph.replay


@dataclass(frozen=True)
class GraphInputs:
    """Named tensors in one run of memory, on the host and on the device: one copy moves them."""

    host: Tensor  # [bytes] uint8, where the device can fetch it by itself
    device: Tensor
    host_views: Mapping[str, Tensor]  # views of the host's
    device_views: Mapping[str, Tensor]  # views of the device's

    @staticmethod
    def allocate(tensors: Mapping[str, Tensor], device: torch.device) -> GraphInputs:
        starts, size = {}, 0
        for name, tensor in tensors.items():
            starts[name] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        host_buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        device_buffer = torch.zeros(size, dtype=torch.uint8, device=device)

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: memory[starts[name] : starts[name] + tensor.nbytes]
                .view(tensor.dtype)
                .view(tensor.shape)
                for name, tensor in tensors.items()
            }

        return GraphInputs(host_buffer, device_buffer, views(host_buffer), views(device_buffer))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take new values. The last ones must have been used: who read a result knows that."""
        for name, tensor in tensors.items():
            self.host_views[name].copy_(tensor)
        self.device.copy_(self.host, non_blocking=True)


@dataclass  # not frozen: the second time it is captured
class CapturedForward:
    """One kind of forward."""

    inputs: GraphInputs
    work: Callable[[], ForwardOutput]
    output: ForwardOutput | None = None
    replay: Callable[[], object] | None = None


class CudaGraphs:
    """The kinds of forward of one transformer. What ``run`` gives stands until it is called again.

    A capture that fails is said once; forwards of its policy then run as if there were no graphs.
    """

    def __init__(self, transformer: Transformer, capture: CaptureFunction | None = None) -> None:
        self._transformer = transformer
        self._capture = capture or CudaGraphCapture()
        self._forwards: dict[tuple[object, ...], CapturedForward] = {}
        self._cache: KVCache | None = None
        self._all_resident = _all_experts_resident(transformer)
        self._failed_policies: set[Policy] = set()

    def can_run(self, context: ForwardContext) -> bool:
        """Whether such forwards can be played again: nothing in them follows the host, and no
        coreset is kept from one to the next."""
        return self._all_resident and context.coresets is None and is_capturable(context.policy)

    def run(
        self,
        tokens: Tensor,
        context: ForwardContext,
        cache_rows: Sequence[int],
        rows: tuple[RowId, ...],
    ) -> ForwardOutput:
        """Logits of a step whose tensors are on the host, but for a cache of all rows; its counts.

        ``places`` are this step's rows of the cache, ``rows`` the names that the counts go by.
        """
        inputs = _changing_tensors(tokens, context)
        if context.cache is not None:
            inputs["places"] = torch.tensor(cache_rows)
        captured = self._forward_for(inputs, context)
        captured.inputs.fill(inputs)
        if captured.output is None:
            captured.output = logits, counter = captured.work()
            return logits, counter.cloned_for(rows)
        if captured.replay is None and context.policy not in self._failed_policies:
            self._capture_forward(captured, context.policy)
        if captured.replay is None:
            logits, counter = captured.work()
            return logits, counter.cloned_for(rows)
        captured.replay()
        logits, counter = captured.output
        return logits, counter.cloned_for(rows)

    def _forward_for(
        self, inputs: Mapping[str, Tensor], context: ForwardContext
    ) -> CapturedForward:
        if context.cache is not None and context.cache is not self._cache:
            self._forwards.clear()  # they know where the old one lies; let its memory go too
            self._cache = context.cache
        shapes = tuple((name, tensor.shape) for name, tensor in inputs.items())
        reach = 0 if context.cache is None else _reach(context.cache, context.window)
        key = (context.policy, context.window.block, reach, shapes)
        if key not in self._forwards:
            while len(self._forwards) >= MAX_GRAPHS:
                del self._forwards[next(iter(self._forwards))]
            self._forwards[key] = self._new(inputs, context, reach)
        return self._forwards[key]

    def _new(
        self, values: Mapping[str, Tensor], context: ForwardContext, reach: int
    ) -> CapturedForward:
        if context.cache is not None:
            context = replace(context, cache=_trimmed(context.cache, reach))
        inputs = GraphInputs.allocate(values, self._transformer.device)
        tokens, device_context = _with_device_views(inputs.device_views, context)

        def work() -> ForwardOutput:
            counter = ExpertCounter()
            counter.on_forward(tuple(range(len(tokens))))
            logits = self._transformer(tokens, replace(device_context, recorder=counter))
            counter.on_forward(())
            return logits, counter

        return CapturedForward(inputs, work)

    def _capture_forward(self, captured: CapturedForward, policy: Policy) -> None:
        device = self._transformer.device
        device_guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with device_guard:
                captured.output, captured.replay = self._capture(captured.work)
        except RuntimeError as error:
            self._failed_policies.add(policy)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logging.getLogger("coterie").warning(
                "No CUDA graph: a forward under %s could not be captured (%s); its layers are "
                "launched one by one",
                format_policy(policy),
                reason,
            )


def is_capturable(policy: Policy) -> bool:
    """Whether a policy is ours and its choices follow from tensors alone, without weighing keys.

    Lots are drawn by the host, and where seats are taken one by one the host is asked how many.
    """
    election = vars(policy).get("election")
    if isinstance(election, Election) and (
        election.vote == "random" or election.tally == "proportional"
    ):
        return False
    return type(policy) in POLICIES.values() and not needs_importance(policy)


def _all_experts_resident(transformer: Transformer) -> bool:
    blocks = (layer.feed_forward for layer in transformer.layers)
    return all(
        block.store.resident(block.layer) is None for block in blocks if isinstance(block, MoE)
    )


def _reach(cache: KVCache, window: Window) -> int:
    """How far the window sees, rounded up."""
    return min(cache.length, -(-int(window.visible.max()) // REACH_MULTIPLE) * REACH_MULTIPLE)


def _trimmed(cache: KVCache, reach: int) -> KVCache:
    """Its first positions."""
    keys, values = (
        tuple(t[:, :, :reach] for t in tensors) for tensors in (cache.keys, cache.values)
    )
    return KVCache(keys, values, cache.row_indices)


def _changing_tensors(tokens: Tensor, context: ForwardContext) -> dict[str, Tensor]:
    """By name, the tensors that change from forward to forward."""
    progress = context.progress or DecodeProgress()
    tensors = {
        "tokens": tokens,
        "start": context.window.start,
        "visible": context.window.visible,
        "wanted": context.logits_indices,
        "voters": context.voters,
        **{f"progress {name}": value for name, value in vars(progress).items()},
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _with_device_views(
    views: Mapping[str, Tensor], context: ForwardContext
) -> tuple[Tensor, ForwardContext]:
    """The tokens and the step again, reading the tensors in their places."""
    window = Window(views["start"], context.window.width, views["visible"], context.window.block)
    progress = None
    if context.progress is not None:
        names = vars(context.progress)
        progress = DecodeProgress(**{name: views.get(f"progress {name}") for name in names})
    cache = None if context.cache is None else replace(context.cache, row_indices=views["places"])
    return views["tokens"], replace(
        context,
        window=window,
        cache=cache,
        logits_indices=views.get("wanted"),
        voters=views.get("voters"),
        progress=progress,
    )
