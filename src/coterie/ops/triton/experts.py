"""Experts for few tokens each: two products that stream the weights once, then a sum; 4 launches.

Only experts that have tokens are read. What comes out does not depend on the order in which
programs run: every pair of a token and an expert has a row of its own, and a token's rows are added
choice by choice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

from coterie.ops.triton import expert_kernels as kernels
from coterie.ops.triton.dispatch import dispatch
from coterie.ops.triton.launch import ceil_div, launch
from coterie.ops.triton.tuning import GemmShape, TileConfig, best_config
from coterie.quantization import QTensor
from coterie.values import Routing, Slab

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_SIZES = (16, 32, 64, 128, 256)
INTERPRETER_MODE = bool(knobs.runtime.interpret)
SUM_COLUMNS = 512  # columns that one program adds up


def supports(x: Tensor, slab: Slab) -> bool:
    """Whether the kernels take these types: floats like x, or whole numbers in usual groups."""
    gate_up, down = slab.gate_up, slab.down
    if x.dtype not in FLOAT_DTYPES or not x.numel() or not len(down):
        return False
    if isinstance(gate_up, QTensor) and isinstance(down, QTensor):
        return gate_up.format == down.format and gate_up.format.group in GROUP_SIZES
    unquantised = isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    return unquantised and gate_up.dtype == down.dtype == x.dtype


def run_experts(
    x: Tensor, routing: Routing, slab: Slab, configs: tuple[TileConfig, TileConfig] | None = None
) -> Tensor:
    """See ``ops.run_experts``. Asks the host nothing; ``plans`` are those of gate-up and down.

    Where experts are quantised, weights and products are in x's precision; sums are always fp32.
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
    constants = {"HIDDEN": hidden, "WIDTH": width, "WIDE": INTERPRETER_MODE}
    gate_up_tensors, down_tensors = _weight_and_scales(slab.gate_up), _weight_and_scales(slab.down)
    launch(
        kernels.gate_up_kernel,
        (max_active * ceil_div(width, gate_up_config.columns),),
        x.contiguous(),
        *gate_up_tensors,
        pairs.token_ids,
        pairs.slot_begin,
        pairs.active_slots,
        h,
        **constants,
        **_layout_constants(*gate_up_tensors, slab.gate_up),
        **gate_up_config.launch_options(),
    )
    launch(
        kernels.down_kernel,
        (max_active * ceil_div(hidden, down_config.columns),),
        h,
        *down_tensors,
        pairs.pair_ids,
        pairs.slot_begin,
        pairs.active_slots,
        y,
        **constants,
        **_layout_constants(*down_tensors, slab.down),
        **down_config.launch_options(),
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
    """The two products of a layer, as plans know them."""
    (tokens, hidden), width = x.shape, slab.down.shape[2]
    quant_format = slab.down.format if isinstance(slab.down, QTensor) else None
    dtype = str(x.dtype).removeprefix("torch.")
    weight_format, group = (
        ("", 1) if quant_format is None else (quant_format.name, quant_format.group)
    )
    return (
        GemmShape(
            "gate-up",
            tokens,
            rows=width,
            k=hidden,
            dtype=dtype,
            weight_format=weight_format,
            group=group,
        ),
        GemmShape(
            "down",
            tokens,
            rows=hidden,
            k=width,
            dtype=dtype,
            weight_format=weight_format,
            group=group,
        ),
    )


def _weight_and_scales(weight: object) -> tuple[Tensor, Tensor]:
    """What is read of a weight: numbers and scales, or the weight twice where it has none."""
    if isinstance(weight, QTensor):
        return contiguous_experts(weight.q), contiguous_experts(weight.scales)
    assert isinstance(weight, Tensor)  # as ``fits`` found it
    return contiguous_experts(weight), weight


def contiguous_experts(weight: Tensor) -> Tensor:
    """The same [n, rows, columns] with each of the n in one run; these may be any way apart."""
    return weight if weight[:1].is_contiguous() else weight.contiguous()


def _layout_constants(numbers: Tensor, scales: Tensor, weight: object) -> dict[str, int]:
    """How far apart rows and experts are, and how their numbers are kept."""
    strides = {"STORED": numbers.shape[-1], "APART": numbers.stride(0)}
    if isinstance(weight, QTensor):
        return {
            **strides,
            "SCALED": scales.shape[-1],
            "SCALES_APART": scales.stride(0),
            "BITS": weight.format.bits,
            "GROUP": weight.format.group,
        }
    return {**strides, "SCALED": 0, "SCALES_APART": 0, "BITS": 16, "GROUP": 1}
