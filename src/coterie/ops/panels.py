"""The layout that the kernels of a CPU read, in plain torch: into it and back, on any device.

Rows stand sixteen at a time beside sixteen others: gate beside up of the same rows, in down the
next sixteen. Such a couple holds, step by step along k, four bytes of each row: two bf16, four
int8, or eight int4, of which the later four are the high halves. Whole numbers are stored with
their zero in the middle of the unsigned range; before each group of them come its scales. What is
past the end of a matrix weighs nothing. An expert is its couples of gate and up, then of down.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.quant import FORMATS, Format, QTensor, stored
from coterie.values import Panels, Slab

LAYOUT = 1
"""Raised whenever the same weight becomes other bytes; ``api.hpp`` says it too."""

Kind: TypeAlias = Literal["bf16", "int8", "int4"]
Weight: TypeAlias = Tensor | QTensor

KINDS: tuple[Kind, ...] = ("bf16", "int8", "int4")
LANES = 16  # rows of a panel
STEP = 4  # bytes of a row in a step
LINE = 64  # bytes that every expert begins at a multiple of


def kind_of(gate_up: Weight | Panels, down: Weight | Panels) -> Kind | None:
    """What these weights are in panels; None where they are none that panels hold."""
    if isinstance(gate_up, QTensor) and isinstance(down, QTensor):
        kinds: tuple[Kind, ...] = ("int8", "int4")
        same = gate_up.format == down.format
        return next((kind for kind in kinds if same and FORMATS[kind] == gate_up.format), None)
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return "bf16" if gate_up.dtype == down.dtype == torch.bfloat16 else None
    return None


def expert_bytes(kind: Kind, *, hidden: int, width: int) -> int:
    """Bytes from one packed expert to the next."""
    ups, downs = _couples(width, LANES), _couples(hidden, 2 * LANES)
    size = ups * _couple_bytes(kind, hidden) + downs * _couple_bytes(kind, width)
    return -(-size // LINE) * LINE


def pack(slab: Slab) -> Slab:
    """The same experts in panels, in memory of their own; the kernels' own pack is far faster."""
    gate_up, down, (experts, hidden, width) = slab.gate_up, slab.down, slab.down.shape
    kind = kind_of(gate_up, down)
    if kind is None or isinstance(gate_up, Panels) or isinstance(down, Panels):
        raise ValueError(f"no panels hold experts in {gate_up.dtype}")
    size = expert_bytes(kind, hidden=hidden, width=width)
    packed = torch.zeros(experts, size, dtype=torch.uint8, device=gate_up.device)
    for expert in range(experts):
        found = pack_expert(gate_up[expert], down[expert])
        packed[expert, : len(found)] = found
    return in_panels(packed, kind, slab.slot_of, hidden=hidden, width=width)


def unpack(slab: Slab) -> Slab:
    """The experts of a slab in panels as they were before; needs their memory once more."""
    panels = slab.gate_up
    if not isinstance(panels, Panels):
        return slab
    _, double, hidden = panels.shape
    found = [
        unpack_expert(blob, panels.format, hidden=hidden, width=double // 2)
        for blob in panels.packed
    ]
    gate_up, down = (_stacked([pair[part] for pair in found]) for part in (0, 1))
    return Slab(gate_up, down, slab.slot_of)


def in_panels(packed: Tensor, kind: Kind, slot_of: Tensor, *, hidden: int, width: int) -> Slab:
    """A slab over packed experts [n, expert_bytes]."""
    gate_up = Panels(packed, kind, (len(packed), 2 * width, hidden))
    return Slab(gate_up, Panels(packed, kind, (len(packed), hidden, width)), slot_of)


def pack_expert(gate_up: Weight, down: Weight) -> Tensor:
    """Bytes [expert_bytes or up to 63 fewer] of gate_up [2 I, H] and down [H, I]."""
    parts = []
    for weight, coupled in ((gate_up, _beside), (down, _one_after_the_other)):
        if isinstance(weight, QTensor):
            numbers, scales = coupled(weight.numbers()), coupled(weight.scales)
            parts.append(_whole_steps(numbers, scales, weight.format))
        else:
            parts.append(_half_steps(coupled(weight)))
    return torch.cat([part.flatten() for part in parts])


def unpack_expert(blob: Tensor, kind: Kind, *, hidden: int, width: int) -> tuple[Weight, Weight]:
    """gate_up [2 I, H] and down [H, I] of an expert's bytes."""
    ups, downs = _couples(width, LANES), _couples(hidden, 2 * LANES)
    end = ups * _couple_bytes(kind, hidden)
    first = blob[:end].view(ups, -1)
    second = blob[end : end + downs * _couple_bytes(kind, width)].view(downs, -1)
    gate_up = [
        part.transpose(0, 1).flatten(1, 2)[:, :width].flatten(0, 1)
        for part in _parts(first, kind, hidden)
    ]
    down = [part.flatten(0, 2)[:hidden] for part in _parts(second, kind, width)]
    return _weight(gate_up, kind, hidden), _weight(down, kind, width)


def _couples(rows: int, each: int) -> int:
    return -(-rows // each)


def _couple_bytes(kind: Kind, k: int) -> int:
    rows = 2 * LANES
    if kind == "bf16":
        return rows * -(-k // 2) * STEP
    form = FORMATS[kind]
    return rows * -(-k // form.group) * (2 + form.group * form.bits // 8)


def _beside(weight: Tensor) -> Tensor:
    """[2 I, k] as couples [c, 2, 16, k]: gate, and up of the same rows."""
    pair = weight.unflatten(0, (2, -1))
    return _padded(pair, -2, LANES).unflatten(1, (-1, LANES)).transpose(0, 1)


def _one_after_the_other(weight: Tensor) -> Tensor:
    """[H, k] as couples [c, 2, 16, k]: sixteen rows, and the next sixteen."""
    return _padded(weight, -2, 2 * LANES).unflatten(0, (-1, 2, LANES))


def _half_steps(couples: Tensor) -> Tensor:
    """bf16 [c, 2, 16, k] as bytes."""
    pairs = _padded(couples, -1, 2).unflatten(-1, (-1, 2))
    return pairs.permute(0, 3, 1, 2, 4).contiguous().view(torch.uint8)


def _whole_steps(numbers: Tensor, scales: Tensor, form: Format) -> Tensor:
    """int8 numbers [c, 2, 16, k] and their bf16 scales [c, 2, 16, groups] as bytes."""
    unsigned = _padded(numbers, -1, form.group).view(torch.uint8) - form.lowest
    if form.bits == 4:
        halves = unsigned.unflatten(-1, (-1, 2, STEP))
        unsigned = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)
    steps = unsigned.unflatten(-1, (scales.shape[-1], -1, STEP)).permute(0, 3, 4, 1, 2, 5)
    before = scales.permute(0, 3, 1, 2).contiguous().view(torch.uint8)
    return torch.cat([before.flatten(2), steps.flatten(2)], dim=-1)


def _parts(couples: Tensor, kind: Kind, k: int) -> list[Tensor]:
    """Of couples' bytes [c, n]: bf16 [c, 2, 16, k]; or numbers like that, and their scales."""
    if kind == "bf16":
        pairs = couples.view(torch.bfloat16).unflatten(-1, (-1, 2, LANES, 2))
        return [pairs.permute(0, 2, 3, 1, 4).flatten(-2)[..., :k]]
    form = FORMATS[kind]
    groups = couples.unflatten(-1, (-(-k // form.group), -1))
    before, steps = groups[..., : 2 * 2 * LANES], groups[..., 2 * 2 * LANES :]
    scales = before.contiguous().view(torch.bfloat16).unflatten(-1, (2, LANES))
    unsigned = steps.unflatten(-1, (-1, 2, LANES, STEP)).permute(0, 3, 4, 1, 2, 5)
    if form.bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-2)
    numbers = unsigned.flatten(3)[..., :k] + form.lowest
    return [numbers.view(torch.int8), scales.permute(0, 2, 3, 1)]


def _weight(parts: list[Tensor], kind: Kind, k: int) -> Weight:
    if kind == "bf16":
        return parts[0].contiguous()
    numbers, scales = parts
    return QTensor(stored(numbers, FORMATS[kind]), scales.contiguous(), FORMATS[kind], k)


def _stacked(weights: list[Weight]) -> Weight:
    whole = [weight for weight in weights if isinstance(weight, Tensor)]
    few = [weight for weight in weights if isinstance(weight, QTensor)]
    if whole:
        return torch.stack(whole)
    numbers, scales = torch.stack([w.q for w in few]), torch.stack([w.scales for w in few])
    return QTensor(numbers, scales, few[0].format, few[0].k)


def _padded(tensor: Tensor, dim: int, to: int) -> Tensor:
    """Zeros at the end of the last or the last but one dimension, up to a multiple."""
    more = -tensor.shape[dim] % to
    return F.pad(tensor, (0, more) if dim == -1 else (0, 0, 0, more)) if more else tensor
