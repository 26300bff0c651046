"""The packed layout of the CPU kernels, in plain torch: packing and unpacking on any device.

A panel is 16 rows; panels are stored in interleaved pairs. A gate panel is paired with the up panel
of the same rows; a down panel is paired with the next one. A pair stores, step by step along k,
four bytes of each row: one fp32, two bf16, four int8, or eight int4 (the later four in the high
nibbles). Packed fp32 exists in memory only.
Integers are stored unsigned, with their zero point in the middle of the range; each group is
preceded by its scales. Rows and columns past the end are zero. An expert is its gate-up pairs, then
its down pairs.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.quantization import FORMATS, QTensor, QuantFormat, pack_values
from coterie.values import STORAGE_DTYPES, PackedExperts, PackedFormat, Slab

LAYOUT_VERSION = 1
"""Incremented whenever the bytes of a packed weight change; ``api.hpp`` has the same number."""

UnpackedWeight: TypeAlias = Tensor | QTensor

PANEL_ROWS = 16  # rows of a panel
STEP_BYTES = 4  # bytes of one row per step
EXPERT_ALIGNMENT = 64  # bytes; every expert starts at a multiple


def packed_format_of(
    gate_up: UnpackedWeight | PackedExperts, down: UnpackedWeight | PackedExperts
) -> PackedFormat | None:
    """The packed format of these weights; None if the layout does not support them."""
    if isinstance(gate_up, QTensor) and isinstance(down, QTensor):
        formats: tuple[PackedFormat, ...] = ("int8", "int4")
        same_format = gate_up.format == down.format
        return next(
            (name for name in formats if same_format and FORMATS[name] == gate_up.format), None
        )
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        floats: tuple[PackedFormat, ...] = ("fp32", "bf16")
        dtypes = (gate_up.dtype, down.dtype)
        return next((name for name in floats if dtypes == (STORAGE_DTYPES[name],) * 2), None)
    return None


@cache
def expert_bytes(format_: PackedFormat, *, hidden: int, width: int) -> int:
    """Bytes of one packed expert, aligned."""
    gate_up_pairs, down_pairs = _pair_count(width, PANEL_ROWS), _pair_count(hidden, 2 * PANEL_ROWS)
    size = gate_up_pairs * _pair_bytes(format_, hidden) + down_pairs * _pair_bytes(format_, width)
    return -(-size // EXPERT_ALIGNMENT) * EXPERT_ALIGNMENT


def pack(slab: Slab) -> Slab:
    """The experts in the packed layout, in new memory; ``cpu.pack`` is far faster."""
    gate_up, down, (experts, hidden, width) = slab.gate_up, slab.down, slab.down.shape
    format_ = packed_format_of(gate_up, down)
    if format_ is None or isinstance(gate_up, PackedExperts) or isinstance(down, PackedExperts):
        raise ValueError(f"the packed layout does not support experts in {gate_up.dtype}")
    size = expert_bytes(format_, hidden=hidden, width=width)
    packed = torch.zeros(experts, size, dtype=torch.uint8, device=gate_up.device)
    for expert in range(experts):
        expert_data = pack_expert(gate_up[expert], down[expert])
        packed[expert, : len(expert_data)] = expert_data
    return slab_of_packed(packed, format_, slab.slot_of, hidden=hidden, width=width)


def unpack(slab: Slab) -> Slab:
    """The experts of a packed slab as matrices again, in new memory."""
    packed = slab.gate_up
    if not isinstance(packed, PackedExperts):
        return slab
    _, gate_up_rows, hidden = packed.shape
    experts = [
        unpack_expert(blob, packed.format, hidden=hidden, width=gate_up_rows // 2)
        for blob in packed.packed
    ]
    gate_up, down = (_stack([weights[index] for weights in experts]) for index in (0, 1))
    return Slab(gate_up, down, slab.slot_of)


def slab_of_packed(
    packed: Tensor, format_: PackedFormat, slot_of: Tensor, *, hidden: int, width: int
) -> Slab:
    """A slab over packed experts [n, expert_bytes]."""
    gate_up = PackedExperts(packed, format_, (len(packed), 2 * width, hidden))
    return Slab(gate_up, PackedExperts(packed, format_, (len(packed), hidden, width)), slot_of)


def pack_expert(gate_up: UnpackedWeight, down: UnpackedWeight) -> Tensor:
    """The packed bytes of gate_up [2 I, H] and down [H, I], without padding to the alignment."""
    parts = []
    for weight, pair_rows in ((gate_up, _pair_gate_with_up), (down, _pair_consecutive_panels)):
        if isinstance(weight, QTensor):
            numbers, scales = pair_rows(weight.int_values()), pair_rows(weight.scales)
            parts.append(_encode_integers(numbers, scales, weight.format))
        else:
            parts.append(_encode_floats(pair_rows(weight)))
    return torch.cat([part.flatten() for part in parts])


def unpack_expert(
    expert_data: Tensor, format_: PackedFormat, *, hidden: int, width: int
) -> tuple[UnpackedWeight, UnpackedWeight]:
    """gate_up [2 I, H] and down [H, I] of one packed expert."""
    gate_up_pairs, down_pairs = _pair_count(width, PANEL_ROWS), _pair_count(hidden, 2 * PANEL_ROWS)
    gate_up_size = gate_up_pairs * _pair_bytes(format_, hidden)
    gate_up_data = expert_data[:gate_up_size].view(gate_up_pairs, -1)
    down_data = expert_data[
        gate_up_size : gate_up_size + down_pairs * _pair_bytes(format_, width)
    ].view(down_pairs, -1)
    gate_up = [
        part.transpose(0, 1).flatten(1, 2)[:, :width].flatten(0, 1)
        for part in _decode_pairs(gate_up_data, format_, hidden)
    ]
    down = [part.flatten(0, 2)[:hidden] for part in _decode_pairs(down_data, format_, width)]
    return _to_weight(gate_up, format_, hidden), _to_weight(down, format_, width)


def _pair_count(rows: int, rows_per_pair: int) -> int:
    return -(-rows // rows_per_pair)


def _pair_bytes(format_: PackedFormat, k: int) -> int:
    rows = 2 * PANEL_ROWS
    if per_step := _float_columns(format_):
        return rows * -(-k // per_step) * STEP_BYTES
    quant_format = FORMATS[format_]
    return rows * -(-k // quant_format.group) * (2 + quant_format.group * quant_format.bits // 8)


def _pair_gate_with_up(weight: Tensor) -> Tensor:
    """[2 I, k] as panel pairs [c, 2, 16, k]: gate, and up of the same rows."""
    gate_and_up = weight.unflatten(0, (2, -1))
    return (
        _pad_to_multiple(gate_and_up, -2, PANEL_ROWS).unflatten(1, (-1, PANEL_ROWS)).transpose(0, 1)
    )


def _pair_consecutive_panels(weight: Tensor) -> Tensor:
    """[H, k] as panel pairs [c, 2, 16, k]: sixteen rows, and the next sixteen."""
    return _pad_to_multiple(weight, -2, 2 * PANEL_ROWS).unflatten(0, (-1, 2, PANEL_ROWS))


def _float_columns(format_: PackedFormat) -> int:
    """Columns of a step; 0 for integers."""
    dtype = STORAGE_DTYPES[format_]
    return STEP_BYTES // dtype.itemsize if dtype.is_floating_point else 0


def _encode_floats(panel_pairs: Tensor) -> Tensor:
    """fp32 or bf16 [c, 2, 16, k] as bytes."""
    per_step = STEP_BYTES // panel_pairs.itemsize
    steps = _pad_to_multiple(panel_pairs, -1, per_step).unflatten(-1, (-1, per_step))
    return steps.permute(0, 3, 1, 2, 4).contiguous().view(torch.uint8)


def _encode_integers(numbers: Tensor, scales: Tensor, quant_format: QuantFormat) -> Tensor:
    """int8 values [c, 2, 16, k] and their bf16 scales [c, 2, 16, groups] as bytes."""
    unsigned = (
        _pad_to_multiple(numbers, -1, quant_format.group).view(torch.uint8) - quant_format.qmin
    )
    if quant_format.bits == 4:
        nibbles = unsigned.unflatten(-1, (-1, 2, STEP_BYTES))
        unsigned = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).flatten(-2)
    steps = unsigned.unflatten(-1, (scales.shape[-1], -1, STEP_BYTES)).permute(0, 3, 4, 1, 2, 5)
    scale_bytes = scales.permute(0, 3, 1, 2).contiguous().view(torch.uint8)
    return torch.cat([scale_bytes.flatten(2), steps.flatten(2)], dim=-1)


def _decode_pairs(panel_pairs: Tensor, format_: PackedFormat, k: int) -> list[Tensor]:
    """From bytes [c, n]: [floats [c, 2, 16, k]], or [int8 values of that shape, their scales]."""
    if per_step := _float_columns(format_):
        columns = panel_pairs.view(STORAGE_DTYPES[format_])
        steps = columns.unflatten(-1, (-1, 2, PANEL_ROWS, per_step))
        return [steps.permute(0, 2, 3, 1, 4).flatten(-2)[..., :k]]
    quant_format = FORMATS[format_]
    groups = panel_pairs.unflatten(-1, (-(-k // quant_format.group), -1))
    scale_bytes, steps = groups[..., : 2 * 2 * PANEL_ROWS], groups[..., 2 * 2 * PANEL_ROWS :]
    scales = scale_bytes.contiguous().view(torch.bfloat16).unflatten(-1, (2, PANEL_ROWS))
    unsigned = steps.unflatten(-1, (-1, 2, PANEL_ROWS, STEP_BYTES)).permute(0, 3, 4, 1, 2, 5)
    if quant_format.bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-2)
    numbers = unsigned.flatten(3)[..., :k] + quant_format.qmin
    return [numbers.view(torch.int8), scales.permute(0, 2, 3, 1)]


def _to_weight(parts: list[Tensor], format_: PackedFormat, k: int) -> UnpackedWeight:
    if _float_columns(format_):
        return parts[0].contiguous()
    numbers, scales = parts
    return QTensor(pack_values(numbers, FORMATS[format_]), scales.contiguous(), FORMATS[format_], k)


def _stack(weights: list[UnpackedWeight]) -> UnpackedWeight:
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    qtensors = [weight for weight in weights if isinstance(weight, QTensor)]
    if tensors:
        return torch.stack(tensors)
    numbers, scales = (
        torch.stack([w.q for w in qtensors]),
        torch.stack([w.scales for w in qtensors]),
    )
    return QTensor(numbers, scales, qtensors[0].format, qtensors[0].k)


def _pad_to_multiple(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    """Pads the last (-1) or second to last (-2) dimension with zeros to a multiple."""
    padding = -tensor.shape[dim] % multiple
    return F.pad(tensor, (0, padding) if dim == -1 else (0, 0, 0, padding)) if padding else tensor
