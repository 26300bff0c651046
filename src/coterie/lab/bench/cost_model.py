"""Bytes and FLOPs of a forward by part, and the roofline time that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from coterie import ops
from coterie.lab.bandwidth import AnyWeight, read_rows, readable_rows, weight_buffers
from coterie.lab.bench.routings import balanced_routing
from coterie.lab.timing import time_once
from coterie.model.cache import KVCache
from coterie.model.moe import Dense, MoE
from coterie.model.quantized_head import QuantizedHead
from coterie.model.spec import ModelSpec
from coterie.model.transformer import ParallelLayer, Transformer
from coterie.model.weights import loaded_tensors, quant_format
from coterie.quantization import quantize
from coterie.values import ExpertRequest, Slab, Window

ForwardPart = Literal[
    "experts", "attention", "shared", "dense", "router", "head", "keys and values"
]
KernelKind = Literal["matrix", "router", "experts"]
KERNEL_KINDS: tuple[KernelKind, ...] = get_args(KernelKind)

PART_OF_WEIGHT: Mapping[str, ForwardPart] = {
    "qkv": "attention",
    "out": "attention",
    "gate": "router",
    "shared.gate_up": "shared",
    "shared.down": "shared",
    "dense.gate_up": "dense",
    "dense.down": "dense",
}
"""By the name of a layer's weight."""

ONE_ROW = torch.ones(1, dtype=torch.bool)
MATRIX_ROWS = 2048  # rows of a matrix that fits in the processor cache
CACHED_EXPERTS = 4  # experts that fit in it
REPEATS = 4  # kernel calls per reading of the clock


@dataclass(frozen=True)
class RandomBlocks:
    """Random blocks after a context of random keys and values."""

    tokens: list[Tensor]  # each [1, N]
    window: Window
    cache: KVCache


@dataclass(frozen=True)
class ForwardCost:
    """Bytes and FLOPs of one forward by part, and the buffers that it reads.

    ``slabs`` are the experts of each layer, of which a forward reads the used ones. ``always_read``
    are the buffers that it reads with any routing.
    """

    slabs: dict[int, list[Slab | Tensor]]
    expert_bytes: dict[int, int]  # bytes of one expert, by layer
    always_read: list[Slab | Tensor]
    part_bytes: Mapping[ForwardPart, int]  # without the experts
    part_flops: Mapping[ForwardPart, int]  # without the experts and the head
    flops_per_pair: int  # one token in one expert
    flops_per_logit: int  # the logits of one position

    def used_expert_bytes(self, used: dict[int, Tensor]) -> int:
        """Bytes of the used experts (by layer, bool [E])."""
        return sum(size * int(used[layer].sum()) for layer, size in self.expert_bytes.items())

    def read(self, used: dict[int, Tensor]) -> None:
        """Reads all bytes of a forward once."""
        for layer, rows in self.slabs.items():
            read_rows(rows, used[layer])
        read_rows(self.always_read, ONE_ROW)

    def flops_by_part(self, pairs: float, num_logits: float) -> dict[ForwardPart, float]:
        """FLOPs by part, for a number of token-expert pairs and of positions with logits."""
        return {
            "experts": self.flops_per_pair * pairs,
            **self.part_flops,
            "head": self.flops_per_logit * num_logits,
        }


@dataclass(frozen=True)
class ComputeProbe:
    """Kernels on weights in the processor cache, which measure arithmetic without memory reads."""

    kernels: Mapping[KernelKind, tuple[Callable[[], object], float]]  # with FLOPs per call
    device: torch.device

    def measure_rates(
        self, kinds: Collection[KernelKind] = KERNEL_KINDS
    ) -> dict[KernelKind, float]:
        """FLOPs per second by kind."""
        rates: dict[KernelKind, float] = {}
        for kind in kinds:
            kernel, flops = self.kernels[kind]
            kernel()  # loads the weights into the cache
            rates[kind] = REPEATS * flops / time_once(partial(_repeat, kernel), self.device)
        return rates


def roofline_seconds(
    part_bytes: Mapping[ForwardPart, float],
    part_flops: Mapping[ForwardPart, float],
    *,
    bandwidth: float,
    rates: Mapping[KernelKind, float],
    overlap: float = 1.0,
) -> float:
    """The sum over parts of reading and computing, in seconds.

    The longer of both hides the share ``overlap`` of the shorter; at 1 it is the sum of the longer.
    """
    total = 0.0
    for part, size in part_bytes.items():
        rate = rates[part if part in ("router", "experts") else "matrix"]
        total += overlapped(size / bandwidth, part_flops[part] / rate, overlap)
    return total


def overlapped(first: float, second: float, overlap: float) -> float:
    """Seconds of two activities, of which the longer hides the share ``overlap`` of the shorter."""
    return first + second - overlap * min(first, second)


def compute_probe(
    spec: ModelSpec, slab: Slab, tokens: int, *, matrix_dtype: torch.dtype, device: torch.device
) -> ComputeProbe:
    """A model's kinds of matrix products, with ``tokens`` tokens each; ``slab`` has its experts."""
    x = torch.randn(tokens, spec.hidden).to(device, matrix_dtype)
    kernels: dict[KernelKind, tuple[Callable[[], object], float]] = {}
    kinds: tuple[KernelKind, ...] = ("matrix", "router")
    for kind, dtype in zip(kinds, (matrix_dtype, torch.float32), strict=True):
        weight = torch.randn(MATRIX_ROWS, spec.hidden).to(device, dtype)
        form = spec.dense_format if kind == "matrix" else None
        weight = ops.prepare_matrix(weight if form is None else quantize(weight, form))
        kernels[kind] = (partial(ops.linear, x, weight), 2 * tokens * MATRIX_ROWS * spec.hidden)
    experts = len(slab.slot_of)
    k = min(CACHED_EXPERTS, experts)
    router = replace(spec.router, experts=experts, k=k, groups=1, topk_groups=1)
    routing = balanced_routing(router, tokens, k, torch.Generator(), device)
    run_experts = partial(ops.run_experts, x, routing, slab)
    kernels["experts"] = (run_experts, tokens * k * flops_per_pair(spec))
    return ComputeProbe(kernels, device)


def forward_cost(transformer: Transformer, blocks: RandomBlocks) -> ForwardCost:
    """The cost of a forward; the looked-up rows of the embedding are ignored."""
    spec = transformer.spec
    slabs: dict[int, list[Slab | Tensor]] = {}
    expert_bytes: dict[int, int] = {}
    parts: dict[ForwardPart, list[AnyWeight]] = {
        name: [] for name in ("attention", "shared", "dense", "router")
    }
    for layer_index, layer in enumerate(transformer.layers):
        parts["attention"] += [layer.attention.qkv, layer.attention.out]
        feed_forward = layer.feed_forward
        if isinstance(feed_forward, MoE):
            (slab,) = feed_forward.store.serve(layer_index, _all_experts(transformer))
            buffers = weight_buffers([slab.gate_up, slab.down])
            slabs[layer_index] = readable_rows(buffers)
            expert_bytes[layer_index] = sum(buffer.nbytes // len(buffer) for buffer in buffers)
            parts["router"].append(feed_forward.gate)
            shared = layer.dense if isinstance(layer, ParallelLayer) else feed_forward.shared
            if shared is not None:
                parts["shared"] += [shared.gate_up, shared.down]
        elif isinstance(feed_forward, Dense):
            parts["dense"] += [feed_forward.gate_up, feed_forward.down]
    head = transformer.head
    parts["head"] = [head.quantized if isinstance(head, QuantizedHead) else head]
    parts["keys and values"] = [*blocks.cache.keys, *blocks.cache.values]
    buffers_of: dict[ForwardPart, list[Tensor]] = {
        name: weight_buffers(weights) for name, weights in parts.items() if weights
    }
    sizes: dict[ForwardPart, int] = {
        name: sum(each.nbytes for each in buffers) for name, buffers in buffers_of.items()
    }
    flat = [buffer.view(1, -1) for buffers in buffers_of.values() for buffer in buffers]
    flops = part_flops(spec, blocks.window.width, int(blocks.window.visible.max()))
    flops_of_parts: dict[ForwardPart, int] = {p: flops[p] for p in sizes if p in flops}
    logit_flops = 2 * spec.hidden * spec.vocabulary
    always_read, pair_flops = readable_rows(flat), flops_per_pair(spec)
    return ForwardCost(
        slabs, expert_bytes, always_read, sizes, flops_of_parts, pair_flops, logit_flops
    )


def part_bytes(spec: ModelSpec, dtype: torch.dtype) -> dict[ForwardPart, int]:
    """Bytes of the weights that every forward reads, from the spec alone.

    Experts, vectors and looked-up rows are no part.
    """
    sizes: dict[ForwardPart, int] = {}
    head = "embedding" if spec.tie_embeddings else "head"
    for name, shape, stored_dtype in loaded_tensors(spec, dtype):
        if quant_format(spec, name) is not None:
            continue  # the rows of a quantised head, of which few are read
        weight = name.removesuffix(".q").removesuffix(".scales")
        of_layer = PART_OF_WEIGHT.get(weight.partition(".")[2].partition(".")[2])
        if (part := "head" if weight == head else of_layer) is not None:
            sizes[part] = sizes.get(part, 0) + prod(shape) * stored_dtype.itemsize
    return sizes


def kv_bytes(spec: ModelSpec, dtype: torch.dtype, positions: int) -> dict[ForwardPart, int]:
    """Bytes of the KV cache that a forward reads."""
    return {"keys and values": positions * spec.kv_features * dtype.itemsize}


def part_flops(spec: ModelSpec, tokens: int, visible_length: int) -> dict[ForwardPart, int]:
    """Two FLOPs per weight and token; for attention also the products with visible keys."""
    num_moe_layers = len(spec.moe_layers)
    flops_per_column = 2 * tokens * spec.hidden
    query_width = sum(spec.heads * layer.head_dim for layer in spec.attention)  # of all layers
    projected = sum(spec.qkv_rows(layer) for layer in range(spec.layers)) + query_width
    return {
        "attention": flops_per_column * projected,
        "shared": flops_per_column * 3 * spec.shared_width * num_moe_layers,
        "dense": flops_per_column * 3 * spec.dense_width * (spec.layers - num_moe_layers),
        "router": flops_per_column * spec.router.experts * num_moe_layers,
        "keys and values": 4 * tokens * query_width * visible_length,
    }


def flops_per_pair(spec: ModelSpec) -> int:
    """FLOPs of one token in one expert."""
    return 6 * spec.hidden * spec.expert_width


def first_slab(transformer: Transformer) -> Slab:
    """The experts of the first MoE layer."""
    layer_index = transformer.spec.moe_layers[0]
    feed_forward = transformer.layers[layer_index].feed_forward
    assert isinstance(feed_forward, MoE)
    return next(iter(feed_forward.store.serve(layer_index, _all_experts(transformer))))


def _all_experts(transformer: Transformer) -> ExpertRequest:
    experts, device = transformer.spec.router.experts, transformer.device
    return ExpertRequest(torch.ones(experts, dtype=torch.bool, device=device))


def _repeat(kernel: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        kernel()
