"""Experts for few tokens each, in 4 launches: dispatch, gate-up, down, weighted sum.

Only experts with tokens are read, once. The result does not depend on the order in which programs
run: each token-expert pair has its own row, and a token's rows are added in the order of its
choices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from triton import knobs

from coterie.ops.triton import expert_kernels as kernels
from coterie.ops.triton.dispatch import dispatch
from coterie.ops.triton.launch import ceil_div, launch
from coterie.ops.triton.tuning import GemmShape, TileConfig, best_config
from coterie.quantization import QTensor
from coterie.values import Activation, Routing, Slab

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_SIZES = (16, 32, 64, 128, 256)
INTERPRETER_MODE = bool(knobs.runtime.interpret)
SUM_COLUMNS = 512  # columns per program of the sum


def supports_experts(x: Tensor, slab: Slab) -> bool:
    """Whether the kernels support these weights: x's dtype, or int8/int4 in GROUP_SIZES."""
    gate_up, down = slab.gate_up, slab.down
    if x.dtype not in FLOAT_DTYPES or not x.numel() or not len(down):
        return False
    if isinstance(gate_up, QTensor) and isinstance(down, QTensor):
        return gate_up.format == down.format and gate_up.format.group in GROUP_SIZES
    unquantised = isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    return unquantised and gate_up.dtype == down.dtype == x.dtype


def run_experts(
    x: Tensor,
    routing: Routing,
    slab: Slab,
    activation: Activation = "silu",
    configs: tuple[TileConfig, TileConfig] | None = None,
) -> Tensor:
    """See ``ops.run_experts``. Does not synchronise with the host.

    ``configs`` are the tilings of gate-up and down. Quantised weights are dequantised to x's dtype;
    sums are always fp32.
    """
    (tokens, hidden), (slots, _, width) = x.shape, slab.down.shape
    choices = routing.topk_ids.shape[1]
    pairs = dispatch(routing, slab.slot_of, slots)
    max_active = min(slots, tokens * choices)
    gate_up_config, down_config = configs or tuple(
        best_config(gemm) for gemm in gemm_shapes(x, slab)
    )
    h = torch.empty(tokens * choices, width, dtype=x.dtype, device=x.device)
    y = torch.empty(tokens * choices, hidden, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    products = (
        (x.contiguous(), slab.gate_up, pairs.token_ids, h, activation, gate_up_config),
        (h, slab.down, pairs.pair_ids, y, "", down_config),
    )
    for source, weight, row_ids, target, gate, config in products:
        numbers, scales = _weight_and_scales(weight)
        launch(
            kernels.product_kernel,
            (max_active * ceil_div(target.shape[1], config.columns),),
            source,
            numbers,
            scales,
            row_ids,
            pairs.slot_begin,
            pairs.active_slots,
            target,
            K=source.shape[1],
            N=target.shape[1],
            ACTIVATION=gate,
            UPCAST=INTERPRETER_MODE,
            **_layout_constants(numbers, scales, weight),
            **config.launch_options(),
        )
    launch(
        kernels.sum_kernel,
        (tokens, ceil_div(hidden, SUM_COLUMNS)),
        y,
        routing.topk_ids.contiguous(),
        slab.slot_of.contiguous(),
        routing.topk_weights.contiguous(),
        out,
        HIDDEN=hidden,
        CHOICES=choices,
        COLUMNS=SUM_COLUMNS,
        num_warps=4,
    )
    return out


def gemm_shapes(x: Tensor, slab: Slab) -> tuple[GemmShape, GemmShape]:
    """The shapes of a layer's two products, as ``tuning`` keys them."""
    (tokens, hidden), width = x.shape, slab.down.shape[2]
    quant_format = slab.down.format if isinstance(slab.down, QTensor) else None
    dtype = str(x.dtype).removeprefix("torch.")
    weight_format, group = (
        ("", 1) if quant_format is None else (quant_format.name, quant_format.group)
    )
    gate_up = GemmShape("gate-up", tokens, width, hidden, dtype, weight_format, group)
    return gate_up, replace(gate_up, name="down", rows=hidden, k=width)


def _weight_and_scales(weight: object) -> tuple[Tensor, Tensor]:
    """The tensors to read: values and scales, or the weight twice if it has no scales."""
    if isinstance(weight, QTensor):
        return contiguous_experts(weight.q), contiguous_experts(weight.scales)
    assert isinstance(weight, Tensor)  # checked by ``supports_experts``
    return contiguous_experts(weight), weight


def contiguous_experts(weight: Tensor) -> Tensor:
    """weight [n, rows, columns] with each of the n contiguous; the stride between them is free."""
    return weight if weight[:1].is_contiguous() else weight.contiguous()


def _layout_constants(numbers: Tensor, scales: Tensor, weight: object) -> dict[str, int]:
    """Strides and number format as kernel constants."""
    strides = {"ROW_SIZE": numbers.shape[-1], "STRIDE": numbers.stride(0)}
    if isinstance(weight, QTensor):
        return {
            **strides,
            "SCALES_SIZE": scales.shape[-1],
            "SCALES_STRIDE": scales.stride(0),
            "BITS": weight.format.bits,
            "GROUP": weight.format.group,
        }
    return {**strides, "SCALES_SIZE": 0, "SCALES_STRIDE": 0, "BITS": 16, "GROUP": 1}
