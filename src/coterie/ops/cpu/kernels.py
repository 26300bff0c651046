"""Packing experts, and calling the kernels on them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from coterie.naming import CoterieError
from coterie.ops.cpu.library import FORMATS, Call, Library, Packing, Reading, library
from coterie.ops.panels import LINE, Kind, in_panels, kind_of
from coterie.quant import QTensor
from coterie.values import Panels, Routing, Slab

OUTCOMES = {
    1: "this instruction set is not there",
    2: "no memory is left for it",
    3: "the routing names an expert or a slot that is not there",
    6: "these are more works than one call takes",
}


def ready() -> bool:
    """Whether the kernels were built and fit this package; if not, why is said once."""
    return library() is not None


def isas() -> tuple[str, ...]:
    """The instruction sets that run here, from the plainest to the best."""
    return tuple(built().isas)


def packed_format(slab: Slab) -> Kind | None:
    """What ``pack`` makes of a slab: None where its weights are none that the kernels take."""
    return kind_of(slab.gate_up, slab.down) if slab.gate_up.device.type == "cpu" else None


def pack(slab: Slab, *, spend: bool = False) -> Slab:
    """The same experts in panels, in memory of their own; ``packed_format`` says which slabs can.

    One expert a thread: beyond the result this needs a few megabytes. With ``spend`` the pages of
    what is packed go back to the system, and the slab that was given is rubble.
    """
    kind, (experts, hidden, width) = packed_format(slab), slab.down.shape
    if kind is None:
        raise ValueError(f"no kernel takes experts in {slab.gate_up.dtype}")
    packed = memory(experts, expert_bytes(kind, hidden=hidden, width=width))
    gate_up, down = slab.gate_up, slab.down
    together = torch.get_num_threads()
    for first in range(0, experts, together):
        some = slice(first, first + together)
        if isinstance(gate_up, QTensor) and isinstance(down, QTensor):
            whole = (gate_up[some], down[some])
            numbers, scales = [q.numbers() for q in whole], [q.scales for q in whole]
            _pack_into(packed[some], kind, numbers, scales)
            spent = [q.q for q in whole] + scales
        else:
            spent = [weight[some] for weight in (gate_up, down) if isinstance(weight, Tensor)]
            _pack_into(packed[some], kind, spent, [])
        if spend:
            give_back(spent)
    return in_panels(packed, kind, slab.slot_of, hidden=hidden, width=width)


def expert_bytes(kind: Kind, *, hidden: int, width: int) -> int:
    """Bytes from one packed expert to the next."""
    size = built().handle.coterie_expert_bytes(FORMATS[kind], hidden, width)
    return -(-size // LINE) * LINE


def run_experts(x: Tensor, routing: Routing, slab: Slab) -> Tensor:
    """See ``ops.run_experts``. Bit for bit the same whatever the number of threads."""
    panels, (tokens, hidden) = slab.gate_up, x.shape
    assert isinstance(panels, Panels)
    slots, double, wanted = panels.shape
    if hidden != wanted:
        raise ValueError(f"tokens of {hidden} numbers meet experts of {wanted}")
    x = x.detach() if x.dtype in (torch.float32, torch.bfloat16) else x.detach().float()
    x, ids, weights = x.contiguous(), routing.ids.contiguous(), routing.weights.contiguous()
    if ids.shape != weights.shape or len(ids) != tokens:
        raise ValueError(
            f"{tokens} tokens, ids {tuple(ids.shape)} and weights {tuple(weights.shape)}"
        )
    if ids.dtype != torch.int64 or weights.dtype != torch.float32:
        raise ValueError(f"ids in {ids.dtype} and weights in {weights.dtype}: int64 and float32")
    out = torch.empty(tokens, hidden)
    found = built()
    call = Call(
        x=x.data_ptr(),
        ids=ids.data_ptr(),
        slot_of=slab.slot_of.data_ptr(),
        weights=weights.data_ptr(),
        out=out.data_ptr(),
        panels=panels.packed.data_ptr(),
        stride=panels.packed.stride(0),
        tokens=tokens,
        k=ids.shape[1],
        experts=len(slab.slot_of),
        slots=slots,
        hidden=hidden,
        width=double // 2,
        threads=torch.get_num_threads(),
        format=FORMATS[panels.format],
        x_is_bf16=x.dtype == torch.bfloat16,
    )
    if outcome := found.handle.coterie_run_experts(found.isa(), ctypes.byref(call)):
        raise RuntimeError(f"the experts could not run: {OUTCOMES[outcome]}")
    return out


def read(slab: Slab, used: Tensor) -> int:
    """Read the bytes of the experts ``used`` (bool [E]) and do nothing else: what memory allows."""
    panels = slab.gate_up
    assert isinstance(panels, Panels)
    slots = slab.slot_of[used]
    call = Reading(
        panels=panels.packed.data_ptr(),
        slots=slots.data_ptr(),
        stride=panels.packed.stride(0),
        bytes=panels.packed.shape[1],
        count=len(slots),
        threads=torch.get_num_threads(),
    )
    return built().handle.coterie_read(ctypes.byref(call))


def memory(experts: int, size: int) -> Tensor:
    """Uninitialised [experts, size] uint8, in huge pages where the system has them."""
    if not experts:
        return torch.empty(0, size, dtype=torch.uint8)
    # Shared memory, which is what mmap makes unless told, gets huge pages on few systems.
    memory = mmap.mmap(-1, experts * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(experts, size)


def give_back(spent: Sequence[Tensor]) -> None:
    """Hand the pages inside these tensors to the system; whoever reads them now finds zeros."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for tensor in spent:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
            )


def _pack_into(to: Tensor, kind: Kind, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """Weights are gate_up [n, 2 I, H] and down [n, H, I]; scales theirs, or none for bf16."""
    experts, hidden, width = weights[1].shape
    if weights[0].shape != (experts, 2 * width, hidden):
        raise ValueError(f"gate_up {tuple(weights[0].shape)} and down {tuple(weights[1].shape)}")
    held = [tensor.contiguous() for tensor in (*weights, *scales)]
    pointers = [tensor.data_ptr() for tensor in held] + [None] * (4 - len(held))
    call = Packing(
        *pointers,
        to.data_ptr(),
        to.stride(0),
        experts,
        hidden,
        width,
        torch.get_num_threads(),
        FORMATS[kind],
    )
    built().handle.coterie_pack(ctypes.byref(call))


def built() -> Library:
    """The kernels; raises CoterieError where there are none."""
    found = library()
    if found is None:
        raise CoterieError("the kernels for CPUs are not built; with a C++ compiler, install again")
    return found
