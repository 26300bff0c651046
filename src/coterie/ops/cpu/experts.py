"""Packs experts and runs them with the kernels."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from coterie.checks import address, describe
from coterie.ops.cpu.library import (
    ACTIVATIONS,
    FORMAT_IDS,
    ExpertsArgs,
    PackArgs,
    ReadArgs,
    require_library,
)
from coterie.ops.packed_layout import expert_bytes, packed_format_of, slab_of_packed
from coterie.ops.threads import busy_threads
from coterie.quantization import QTensor
from coterie.values import Activation, PackedExperts, PackedFormat, Routing, Slab


def packed_format(slab: Slab) -> PackedFormat | None:
    """The format in which ``pack`` stores a slab; None if the kernels do not support it."""
    return packed_format_of(slab.gate_up, slab.down) if slab.gate_up.device.type == "cpu" else None


def pack(slab: Slab, *, release_source: bool = False) -> Slab:
    """The experts in the packed layout, in new memory; see ``packed_format`` for supported slabs.

    Packs one expert per thread, so it needs only a few megabytes besides the result. With
    ``release_source`` the source pages are returned to the system and ``slab`` becomes invalid.
    """
    format_, (experts, hidden, width) = packed_format(slab), slab.down.shape
    if format_ is None:
        raise ValueError(f"the kernels do not support experts in {slab.gate_up.dtype}")
    packed = allocate(experts, expert_bytes(format_, hidden=hidden, width=width))
    gate_up, down = slab.gate_up, slab.down
    batch_size = torch.get_num_threads()
    for first in range(0, experts, batch_size):
        batch = slice(first, first + batch_size)
        if isinstance(gate_up, QTensor) and isinstance(down, QTensor):
            qtensors = (gate_up[batch], down[batch])
            numbers, scales = [q.int_values() for q in qtensors], [q.scales for q in qtensors]
            _pack_into(packed[batch], format_, numbers, scales)
            sources = [q.q for q in qtensors] + scales
        else:
            sources = [weight[batch] for weight in (gate_up, down) if isinstance(weight, Tensor)]
            _pack_into(packed[batch], format_, sources, [])
        if release_source:
            release_pages(sources)
    return slab_of_packed(packed, format_, slab.slot_of, hidden=hidden, width=width)


def run_experts(x: Tensor, routing: Routing, slab: Slab, activation: Activation = "silu") -> Tensor:
    """See ``ops.run_experts``. The result is bit-identical for any number of threads."""
    packed, (tokens, hidden) = _packed_experts(slab), x.shape
    slots, expert_hidden, width = slab.down.shape
    if hidden != expert_hidden:
        raise ValueError(f"tokens have {hidden} features, the experts {expert_hidden}")
    x = x.detach() if x.dtype in (torch.float32, torch.bfloat16) else x.detach().float()
    x, ids = x.contiguous(), routing.topk_ids.contiguous()
    weights, k = routing.topk_weights.contiguous(), ids.shape[-1]
    out = torch.empty(tokens, hidden)
    args = ExpertsArgs(
        x=address(x, x.dtype, (tokens, hidden), "tokens"),
        ids=address(ids, torch.int64, (tokens, k), "expert ids"),
        slot_of=address(slab.slot_of, torch.int64, slab.slot_of.shape, "slots"),
        weights=address(weights, torch.float32, (tokens, k), "expert weights"),
        out=out.data_ptr(),
        panels=packed.packed.data_ptr(),
        stride=packed.packed.stride(0),
        tokens=tokens,
        k=k,
        experts=len(slab.slot_of),
        slots=slots,
        hidden=hidden,
        width=width,
        threads=busy_threads(3 * tokens * k * hidden * width),
        format=FORMAT_IDS[packed.format],
        x_is_bf16=x.dtype == torch.bfloat16,
        activation=ACTIVATIONS.index(activation),
    )
    require_library().call("run_experts", args)
    return out


def read_experts(slab: Slab, used: Tensor) -> int:
    """Reads the bytes of the experts ``used`` (bool [E]) and computes nothing else."""
    packed = slab.gate_up
    assert isinstance(packed, PackedExperts)
    slots = slab.slot_of[used]
    if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < len(packed):
        raise ValueError(f"an expert is absent, or not in one of {len(packed)} slots")
    args = ReadArgs(
        panels=packed.packed.data_ptr(),
        slots=address(slots, torch.int64, (len(slots),), "slots"),
        stride=packed.packed.stride(0),
        bytes=packed.packed.shape[1],
        count=len(slots),
        threads=torch.get_num_threads(),
    )
    return require_library().handle.coterie_read_experts(ctypes.byref(args))


def allocate(experts: int, size: int) -> Tensor:
    """Uninitialised [experts, size] uint8, in huge pages if the system supports them."""
    if not experts * size:
        return torch.empty(experts, size, dtype=torch.uint8)
    # Private: mmap's default, shared memory, gets huge pages on few systems.
    mapping = mmap.mmap(-1, experts * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a system without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8).view(experts, size)


def release_pages(tensors: Sequence[Tensor]) -> None:
    """Returns the pages inside these tensors to the system; reading them yields zeros."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for tensor in tensors:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
            )


def _packed_experts(slab: Slab) -> PackedExperts:
    """Gate, up and down of a packed slab; raises ValueError if they do not belong together."""
    packed, down = slab.gate_up, slab.down
    assert isinstance(packed, PackedExperts)
    assert isinstance(down, PackedExperts)
    slots, hidden, width = down.shape
    size = expert_bytes(packed.format, hidden=hidden, width=width)
    is_same = packed.format == down.format and packed.packed.data_ptr() == down.packed.data_ptr()
    if not is_same or packed.shape != (slots, 2 * width, hidden):
        raise ValueError(
            f"gate_up {packed.shape} and down {down.shape} are not of the same experts"
        )
    if packed.packed.shape[1] < size:
        raise ValueError(f"packed experts {packed.shape}: {describe(packed.packed)} is too small")
    return packed


def _pack_into(
    packed: Tensor, format_: PackedFormat, weights: Sequence[Tensor], scales: Sequence[Tensor]
) -> None:
    """Packs gate_up [n, 2 I, H] and down [n, H, I] with their scales (none for bf16)."""
    experts, hidden, width = weights[1].shape
    if weights[0].shape != (experts, 2 * width, hidden):
        raise ValueError(f"gate_up {tuple(weights[0].shape)} and down {tuple(weights[1].shape)}")
    tensors = [tensor.contiguous() for tensor in (*weights, *scales)]
    pointers = [address(tensor, tensor.dtype, tensor.shape, "weights") for tensor in tensors]
    pointers += [None] * (4 - len(tensors))
    args = PackArgs(
        *pointers,
        packed.data_ptr(),
        packed.stride(0),
        experts,
        hidden,
        width,
        torch.get_num_threads(),
        FORMAT_IDS[format_],
    )
    require_library().handle.coterie_pack(ctypes.byref(args))
