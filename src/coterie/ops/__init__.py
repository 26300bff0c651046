"""The contracts of every operation that may have a faster twin, and the one place that picks one.

``reference`` is the truth: plain torch, correct on any device. A faster version has the same name
and signature and is compared with it by value.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from coterie.ops import cpu, gpu, grouped, panels, reference
from coterie.ops.panels import unpack
from coterie.ops.reference import top_ids, top_mask
from coterie.quant import FORMATS, QTensor
from coterie.values import (
    KeyValues,
    Matrix,
    PackedMatrix,
    Panels,
    Routing,
    Rule,
    Scores,
    Sight,
    Slab,
    Survey,
)

__all__ = [
    "add_norm",
    "attend",
    "attention",
    "gated",
    "linear",
    "pack",
    "prepare",
    "prepare_matrix",
    "rms_norm",
    "route",
    "run_experts",
    "survey",
    "swiglu",
    "top_ids",
    "top_mask",
    "unpack",
    "voices",
]


def route(scores: Scores, rule: Rule | None, voice: Tensor | None) -> Routing | None:
    """Election, choice inside the coreset and weights by one kernel; None where there is none.

    Without a ``rule``, the unmodified model. ``voice`` [S, N] fp32 >= 0 is what each token's vote
    weighs, with a voter in every row (None: everybody 1). What it gives equals what
    ``routing.route`` makes of the same rule in plain torch: ids, used, own and what came of
    incumbents exactly, weights to rounding. Also None for logits on a CPU that are no numbers: who
    asks then finds out which. A GPU computes probabilities itself: what differs in the last bits
    there may decide otherwise; of incumbents its kernel knows nothing (None).
    """
    device = scores.logits.device.type
    if device == "cuda" and gpu.ready():
        return gpu.route(scores, rule, voice)
    return cpu.route(scores, rule, voice) if device == "cpu" else None


def voices(asked: Tensor | None, narrowing: Tensor | None, *, opposite: bool = False) -> Tensor:
    """What each token's vote weighs, [S, N] fp32: ``asked``, times ``narrowing``, both >= 0.

    A row that narrowing leaves without a voter keeps those asked; a row without these has all of
    its tokens vote. At least one of the two is given. ``opposite``: narrowing, a mask, names those
    who do not vote.
    """
    known = asked if narrowing is None else narrowing
    if known is not None and known.device.type == "cuda" and gpu.ready():
        return gpu.voices(asked, narrowing, opposite)
    return reference.voices(asked, narrowing, opposite=opposite)


def run_experts(x: Tensor, routing: Routing, slab: Slab) -> Tensor:
    """Weighted sum of the SwiGLU experts that ``slab`` holds: x [T, H] -> [T, H], always fp32.

    Ids of -1 and experts absent from the slab add nothing, so the slabs of one layer add up. A slab
    on another device than x is computed there: what it needs goes once, and waits for x.
    """
    if (there := slab.gate_up.device) != x.device:
        ids, weights = routing.ids.to(there), routing.weights.to(there)
        moved = Routing(ids, weights, routing.used.to(there), ids)
        return run_experts(x.to(there), moved, slab).to(x.device)
    if isinstance(slab.gate_up, Panels):
        return cpu.run_experts(x, routing, slab)
    if x.device.type == "cpu" and grouped.fits(x, slab):
        return grouped.run_experts(x, routing, slab)
    if x.is_cuda and gpu.ready() and (out := gpu.run_experts(x, routing, slab)) is not None:
        return out
    return reference.run_experts(x, routing, slab)


def linear(x: Tensor, weight: Matrix, *, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., k] times the transpose of weight [rows, k] -> [..., rows], in ``dtype`` or x's own.

    Computed in the weight's precision, whatever that of x; sums are fp32.
    """
    dtype = x.dtype if dtype is None else dtype
    if isinstance(weight, PackedMatrix):
        return cpu.linear(x, weight, dtype)
    return reference.linear(x, weight, dtype)


def attend(
    qkv: Tensor, norms: tuple[Tensor, Tensor], sight: Sight, held: KeyValues, epsilon: float
) -> Tensor | None:
    """Attention from projections to mixed values by one kernel; None where there is none.

    qkv [B, W, heads + 2 kv_heads, D]: queries and keys are normed (``norms`` [D] each), turned by
    position, keys and values written into ``held``, and what every query sees is mixed, [B, W,
    heads, D]. What it equals is in ``model.attention``, in plain torch.
    """
    if qkv.is_cuda and gpu.ready():
        return gpu.attend(qkv, norms, sight, held, epsilon)
    return cpu.attend(qkv, norms, sight, held, epsilon) if cpu.attends(qkv) else None


def attention(
    x: Tensor,
    weights: tuple[Matrix, Matrix],
    norms: tuple[Tensor, Tensor],
    *,
    sight: Sight,
    held: KeyValues,
    epsilon: float,
) -> Tensor | None:
    """``attend`` between the products before and after it, x [B, W, H] -> [B, W, H], by one call;
    None where there is none. ``weights`` are those of queries, keys and values, and of the output.
    """
    before, after = weights
    if not isinstance(before, PackedMatrix) or not isinstance(after, PackedMatrix):
        return None
    if not cpu.attends(x) or held.keys.shape[-1] % 2:
        return None
    return cpu.attention(x, (before, after), norms, sight=sight, held=held, epsilon=epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) over the last axis, computed in fp32 and rounded before the weight multiplies."""
    if cpu.norms(x, weight):
        return cpu.rms_norm(x, weight, epsilon)
    if x.is_cuda and gpu.ready() and (out := gpu.rms_norm(x, weight, epsilon)) is not None:
        return out
    return reference.rms_norm(x, weight, epsilon)


def add_norm(x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + more, both of one shape and type, and its ``rms_norm``."""
    if cpu.norms(x, weight) and more.dtype == x.dtype and more.shape == x.shape:
        return cpu.add_norm(x, more, weight, epsilon)
    total = x + more
    return total, rms_norm(total, weight, epsilon)


def gated(both: Tensor) -> Tensor:
    """silu of the first half of [..., 2 I] times the second, [..., I]."""
    if both.is_cuda and gpu.ready():
        return gpu.gated(both)
    return reference.gated(both)


def swiglu(x: Tensor, gate_up: Matrix, down: Matrix, beside: Tensor | None = None) -> Tensor:
    """``gated`` between two products: x [..., H] -> [..., H], added to ``beside`` (fp32, as many
    numbers) where that is given, which one rounding may do or two."""
    half = x.dtype == torch.bfloat16
    if half and isinstance(gate_up, PackedMatrix) and isinstance(down, PackedMatrix):
        return cpu.swiglu(x, gate_up, down, beside)
    out = linear(gated(linear(x, gate_up)), down)
    return out if beside is None else beside.to(x.dtype).view_as(out) + out


def survey(logits: Tensor, mask: int) -> Survey:
    """What each row of logits [w, V] says, where ``mask`` is no answer."""
    if cpu.surveys(logits):
        return cpu.survey(logits, mask)
    if logits.is_cuda and logits.dtype == torch.float32 and gpu.ready():
        return gpu.survey(logits, mask)
    return reference.survey(logits, mask)


def prepare_matrix(weight: Tensor, *, spend: bool = False) -> Matrix:
    """The same matrix as ``linear`` reads it fastest here; see ``prepare``."""
    return cpu.pack_matrix(weight, spend=spend) if cpu.packs(weight) and cpu.ready() else weight


def prepare(slab: Slab, *, spend: bool = False) -> Slab:
    """The same experts as they run fastest here; their old memory is not needed any more.

    ``spend``: nobody else has that memory, and it may be given back expert by expert meanwhile.
    """
    if cpu.packed_format(slab) is not None and cpu.ready():
        return cpu.pack(slab, spend=spend)
    if slab.gate_up.device.type == "cpu" and isinstance(slab.gate_up, QTensor) and cpu.ready():
        _regret(str(slab.gate_up.format))
    return slab


def pack(slab: Slab) -> Slab:
    """The same experts in panels, byte for byte alike with and without kernels; see ``panels``.

    Raises ValueError for experts that no panels hold: floats other than bf16, other groups.
    """
    if cpu.packed_format(slab) is not None and cpu.ready():
        return cpu.pack(slab)
    return panels.pack(slab)


@cache
def _regret(form: str) -> None:
    """Says, once for each form of experts, that they are slow."""
    logging.getLogger("coterie").warning(
        "Experts in %s run on PyTorch alone, many times slower than need be: the kernels for CPUs "
        "take %s",
        form,
        " and ".join(str(known) for known in FORMATS.values()),
    )
