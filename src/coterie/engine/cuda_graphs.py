"""CUDA graphs of decode forwards, which remove the launch overhead between layers.

Forwards of equal shapes, policy and attention length share a graph. The first one runs as usual,
the second one is captured, and later ones copy their inputs into place and replay the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from coterie.engine.batch import routing_inputs, with_routing_inputs
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import MoE
from coterie.model.transformer import Transformer
from coterie.routing import POLICIES, Election, format_policy, needs_importance
from coterie.telemetry import ExpertCounter, RowId
from coterie.values import Policy, Window

Output = TypeVar("Output")
ForwardOutput = tuple[Tensor, ExpertCounter]
Replay = Callable[[], object]
CaptureFunction = Callable[[Callable[[], ForwardOutput]], tuple[ForwardOutput, Replay]]
"""Captures a function with inputs in fixed memory; a replay overwrites its output."""

# Attention lengths are rounded up to a multiple of this, so that few lengths need a new graph.
LENGTH_MULTIPLE = 256
MAX_GRAPHS = 32
ALIGNMENT = 64  # bytes


class CudaGraphCapture:
    """Captures CUDA graphs in one memory pool: the next replay overwrites the last output.

    PyTorch cannot capture into a pool after all of its graphs are freed, so a trivial graph, the
    anchor, lives as long as the pool. After a failed capture the pool is replaced: the allocator
    may still record into it.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None

    def __call__(self, work: Callable[[], ForwardOutput]) -> tuple[ForwardOutput, Replay]:
        """Raises RuntimeError if ``work`` synchronizes with the host.

        Afterwards the stream, the allocator and the random generators are as before.
        """
        if self._anchor is None:
            self._open_pool()
        graph = torch.cuda.CUDAGraph()
        try:
            output = self._record(graph, work)
        except BaseException:
            # The capture of a new anchor also ends the failed one for the random generators.
            self._open_pool()
            raise
        return output, graph.replay

    def _open_pool(self) -> None:
        self._anchor = None
        self._pool, anchor = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        self._record(anchor, lambda: torch.zeros(1, device=torch.cuda.current_device()))
        self._anchor = anchor

    def _record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], Output]) -> Output:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            # PyTorch 2.11 writes to a tensor of its own here, which must allow that.
            with torch.inference_mode(False):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = work()
            except BaseException:
                with suppress(RuntimeError):  # it says again that the capture failed
                    graph.capture_end()
                raise
            graph.capture_end()
        return output


@dataclass(frozen=True)
class GraphInputs:
    """Named tensors in one buffer on the host and one on the device, moved by one copy."""

    host: Tensor  # [bytes] uint8, pinned
    device: Tensor
    host_views: Mapping[str, Tensor]
    device_views: Mapping[str, Tensor]

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
        """Copy new inputs in place. The previous forward must have finished."""
        for name, tensor in tensors.items():
            self.host_views[name].copy_(tensor)
        self.device.copy_(self.host, non_blocking=True)


@dataclass  # not frozen: its second run captures it
class CapturedForward:
    """Forwards that share a graph: their inputs, and from the second run on the graph's replay."""

    inputs: GraphInputs
    work: Callable[[], ForwardOutput]
    output: ForwardOutput | None = None
    replay: Replay | None = None


class CudaGraphs:
    """The graphs of one transformer. Each ``run`` may overwrite the output of the last one.

    If a capture fails, a warning is logged once and forwards of that policy run without graphs.
    """

    def __init__(self, transformer: Transformer, capture: CaptureFunction | None = None) -> None:
        self._transformer = transformer
        self._capture = capture or CudaGraphCapture()
        self._forwards: dict[tuple[object, ...], CapturedForward] = {}
        self._cache: KVCache | None = None
        self._all_resident = _all_experts_resident(transformer)
        self._failed_policies: set[Policy] = set()

    def can_run(self, context: ForwardContext) -> bool:
        """Whether the forward can be captured: no work on the host, and no coreset to reuse."""
        return self._all_resident and context.coresets is None and is_capturable(context.policy)

    def run(
        self,
        tokens: Tensor,
        context: ForwardContext,
        cache_rows: Sequence[int],
        rows: tuple[RowId, ...],
    ) -> ForwardOutput:
        """The logits and expert counts of one forward with inputs on the host.

        ``context.cache`` has all cache rows; ``cache_rows`` are those of this forward. ``rows``
        name its sequences in the counts.
        """
        inputs = _input_tensors(tokens, context)
        if context.cache is not None:
            inputs["cache_rows"] = torch.tensor(cache_rows)
        captured = self._forward_for(inputs, context)
        captured.inputs.fill(inputs)
        is_first, can_capture = captured.output is None, context.policy not in self._failed_policies
        if not is_first and captured.replay is None and can_capture:
            self._capture_forward(captured, context.policy)
        if captured.output is None or captured.replay is None:
            captured.output = captured.work()
        else:
            captured.replay()
        logits, counter = captured.output
        return logits, counter.cloned_for(rows)

    def _forward_for(
        self, inputs: Mapping[str, Tensor], context: ForwardContext
    ) -> CapturedForward:
        if context.cache is not None and context.cache is not self._cache:
            # Graphs hold the addresses of the old cache, and keep its memory allocated.
            self._forwards.clear()
            self._cache = context.cache
        shapes = tuple((name, tensor.shape) for name, tensor in inputs.items())
        length = 0 if context.cache is None else _attention_length(context.cache, context.window)
        key = (context.policy, context.window.block, length, shapes)
        captured = self._forwards.pop(key, None) or self._new_forward(inputs, context, length)
        while len(self._forwards) >= MAX_GRAPHS:  # the least recently used one comes first
            del self._forwards[next(iter(self._forwards))]
        self._forwards[key] = captured
        return captured

    def _new_forward(
        self, values: Mapping[str, Tensor], context: ForwardContext, length: int
    ) -> CapturedForward:
        if context.cache is not None:
            context = replace(context, cache=_truncated(context.cache, length))
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
                "No CUDA graph: a forward under %s could not be captured (%s); "
                "forwards under it run without graphs",
                format_policy(policy),
                reason,
            )


def is_capturable(policy: Policy) -> bool:
    """Whether a policy is one of ``POLICIES`` and routes without the host.

    Random votes are drawn on the host. A proportional tally reads the number of experts there.
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


def _attention_length(cache: KVCache, window: Window) -> int:
    """The number of cached positions that the forward reads."""
    return min(cache.length, -(-int(window.visible.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def _truncated(cache: KVCache, length: int) -> KVCache:
    keys, values = (
        tuple(t[:, :, :length] for t in tensors) for tensors in (cache.keys, cache.values)
    )
    return KVCache(keys, values, cache.row_indices)


def _input_tensors(tokens: Tensor, context: ForwardContext) -> dict[str, Tensor]:
    """The tensors that change from forward to forward, by name."""
    window = {"start": context.window.start, "visible": context.window.visible}
    return {"tokens": tokens, **window, **routing_inputs(context)}


def _with_device_views(
    views: Mapping[str, Tensor], context: ForwardContext
) -> tuple[Tensor, ForwardContext]:
    """The tokens, and the context with its tensors replaced by views of the device buffer."""
    window = replace(context.window, start=views["start"], visible=views["visible"])
    cache = context.cache
    if cache is not None:
        cache = replace(cache, row_indices=views["cache_rows"])
    context = with_routing_inputs(context, views)
    return views["tokens"], replace(context, window=window, cache=cache)
