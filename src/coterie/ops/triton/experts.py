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
from coterie.ops.triton.launch import launch, pieces
from coterie.ops.triton.plans import Plan, Work, chosen
from coterie.quant import QTensor
from coterie.values import Routing, Slab

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (16, 32, 64, 128, 256)
INTERPRETED = bool(knobs.runtime.interpret)
SUMMED = 512  # columns that one program adds up


def fits(x: Tensor, slab: Slab) -> bool:
    """Whether the kernels take these types: floats like x, or whole numbers in usual groups."""
    gate_up, down = slab.gate_up, slab.down
    if x.dtype not in FLOATS or not x.numel() or not len(down):
        return False
    if isinstance(gate_up, QTensor) and isinstance(down, QTensor):
        return gate_up.format == down.format and gate_up.format.group in GROUPS
    plain = isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    return plain and gate_up.dtype == down.dtype == x.dtype


def run_experts(
    x: Tensor, routing: Routing, slab: Slab, plans: tuple[Plan, Plan] | None = None
) -> Tensor:
    """See ``ops.run_experts``. Asks the host nothing; ``plans`` are those of gate-up and down.

    Where experts are quantised, weights and products are in x's precision; sums are always fp32.
    """
    (tokens, hidden), (slots, _, width) = x.shape, slab.down.shape
    choices = routing.ids.shape[1]
    lists = dispatch(routing, slab.slot_of, slots)
    places = min(slots, tokens * choices)
    first, second = plans or tuple(chosen(work) for work in works(x, slab))
    h = torch.empty(tokens * choices, width, dtype=x.dtype, device=x.device)
    y = torch.empty(tokens * choices, hidden, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    shape = {"HIDDEN": hidden, "WIDTH": width, "WIDE": INTERPRETED}
    ups, downs = _stored(slab.gate_up), _stored(slab.down)
    launch(
        kernels.gate_up_kernel,
        (places * pieces(width, first.columns),),
        x.contiguous(),
        *ups,
        lists.token,
        lists.begin,
        lists.active,
        h,
        **shape,
        **_layout(*ups, slab.gate_up),
        **first.sizes(),
    )
    launch(
        kernels.down_kernel,
        (places * pieces(hidden, second.columns),),
        h,
        *downs,
        lists.pair,
        lists.begin,
        lists.active,
        y,
        **shape,
        **_layout(*downs, slab.down),
        **second.sizes(),
    )
    launch(
        kernels.sum_kernel,
        (tokens, pieces(hidden, SUMMED)),
        y,
        routing.ids.contiguous(),
        slab.slot_of.contiguous(),
        routing.weights.contiguous(),
        out,
        HIDDEN=hidden,
        CHOICES=choices,
        COLUMNS=SUMMED,
        num_warps=4,
    )
    return out


def works(x: Tensor, slab: Slab) -> tuple[Work, Work]:
    """The two products of a layer, as plans know them."""
    (tokens, hidden), width = x.shape, slab.down.shape[2]
    form = slab.down.format if isinstance(slab.down, QTensor) else None
    dtype = str(x.dtype).removeprefix("torch.")
    kind, group = ("", 1) if form is None else (form.name, form.group)
    return (
        Work("gate-up", tokens, rows=width, k=hidden, dtype=dtype, kind=kind, group=group),
        Work("down", tokens, rows=hidden, k=width, dtype=dtype, kind=kind, group=group),
    )


def _stored(weight: object) -> tuple[Tensor, Tensor]:
    """What is read of a weight: numbers and scales, or the weight twice where it has none."""
    if isinstance(weight, QTensor):
        return in_rows(weight.q), in_rows(weight.scales)
    assert isinstance(weight, Tensor)  # as ``fits`` found it
    return in_rows(weight), weight


def in_rows(weight: Tensor) -> Tensor:
    """The same [n, rows, columns] with each of the n in one run; these may be any way apart."""
    return weight if weight[:1].is_contiguous() else weight.contiguous()


def _layout(numbers: Tensor, scales: Tensor, weight: object) -> dict[str, int]:
    """How far apart rows and experts are, and how their numbers are kept."""
    apart = {"STORED": numbers.shape[-1], "APART": numbers.stride(0)}
    if isinstance(weight, QTensor):
        return {
            **apart,
            "SCALED": scales.shape[-1],
            "SCALES_APART": scales.stride(0),
            "BITS": weight.format.bits,
            "GROUP": weight.format.group,
        }
    return {**apart, "SCALED": 0, "SCALES_APART": 0, "BITS": 16, "GROUP": 1}
