"""The CPU beside a GPU: experts as its kernels read them, and what one costs here and there."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.room import free_memory
from coterie.experts.aside import Aside, AtMost, BreakEven
from coterie.experts.couriers import Courier
from coterie.model.checkpoint import Checkpoint
from coterie.model.filling import mapped
from coterie.model.spec import ModelSpec
from coterie.model.weights import Place, is_packed
from coterie.naming import CoterieError
from coterie.ops import cpu
from coterie.ops.blobs import Layout
from coterie.ops.panels import in_panels
from coterie.values import Routing, Slab

HOST = torch.device("cpu")
ROUNDS = 5
EXPERTS, TOKENS = 8, 8  # of a layer on the CPU that is timed, and of each of its experts
COPIED = 16  # experts that are copied one after the other


def host_slabs(
    layout: Layout,
    blobs: Mapping[int, Tensor],
    checkpoint: Checkpoint,
    places: Mapping[str, Place],
    stored: ModelSpec,
) -> dict[int, Slab]:
    """All experts of each layer as a CPU computes them best, from ``blobs`` that hold them all.

    Where kernels take them, in memory of their own: mapped from a packed checkpoint, or packed
    here. Raises CoterieError where there is none.
    """
    plain = {layer: layout.shown(blob, torch.arange(len(blob))) for layer, blob in blobs.items()}
    some = next(iter(plain.values()))
    if not cpu.ready() or cpu.packed_format(some) is None:
        return plain
    more, free = sum(blob.nbytes for blob in blobs.values()), free_memory(HOST)
    if free is not None and more > free:
        raise CoterieError(
            "--cpu-experts: the kernels of a CPU read experts in another order, for which "
            f"{more:,} bytes more of host memory are needed, and {free:,} are free"
        )
    if stored.panels:
        return _mapped(checkpoint, places, stored)
    return {layer: ops.pack(slab) for layer, slab in plain.items()}


def _mapped(
    checkpoint: Checkpoint, places: Mapping[str, Place], stored: ModelSpec
) -> dict[int, Slab]:
    found = {}
    for file, entries in checkpoint.files.items():
        for name, entry in entries.items():
            target = places[name].target
            if not is_packed(target):
                continue
            descriptor = os.open(file, os.O_RDONLY)
            try:
                packed = mapped(descriptor, entry)
            finally:
                os.close(descriptor)
            sizes = {"hidden": stored.hidden, "width": stored.expert_width}
            everyone = torch.arange(len(packed))
            slab = in_panels(packed, stored.panel_kind, everyone, **sizes)
            found[int(target.split(".")[1])] = slab
    return found


def measured(
    courier: Courier,
    slabs: Mapping[int, Slab],
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> BreakEven:
    """What copies of so many bytes and computing take on this machine, each alone; medians of a few
    rounds."""
    layer, slab = next(iter(slabs.items()))
    experts, hidden = len(slab.slot_of), slab.down.shape[1]
    few = min(EXPERTS, experts)
    x = torch.randn(few * TOKENS, hidden, device=device).to(dtype)

    def layer_of(count: int, tokens: int) -> Callable[[int], object]:
        def work(turn: int) -> object:
            # Others every time, so that no cache holds them.
            ids = (turn * count + torch.arange(count).repeat_interleave(tokens)) % experts
            routing = _routing(ids[:, None].to(device), experts)
            return ops.run_experts(x[: len(ids)], routing, slab)

        return work

    into = torch.empty(min(COPIED, experts), size, dtype=torch.uint8, device=device)
    copy = _copying(courier, layer, experts, into)
    if few < 2:
        return BreakEven(copy, _seconds(layer_of(1, 1)), 0.0, 0.0)
    one, many, full = (_seconds(layer_of(*of)) for of in ((1, 1), (few, 1), (few, TOKENS)))
    return BreakEven.through(copy, one=one, many=many, full=full, experts=few, tokens=TOKENS)


def _copying(courier: Courier, layer: int, experts: int, into: Tensor) -> float:
    """Seconds to copy an expert while others wait to be."""
    courier.computed()  # with what lay there before

    def work(turn: int) -> None:
        first = turn * len(into)
        courier.settle(
            [courier.bring(layer, (first + at) % experts, slot) for at, slot in enumerate(into)]
        )

    return _seconds(work) / len(into)


def _routing(ids: Tensor, experts: int) -> Routing:
    used = torch.zeros(experts, dtype=torch.bool, device=ids.device)
    return Routing(ids, torch.ones(ids.shape, device=ids.device), used, ids)


def _seconds(work: Callable[[int], object]) -> float:
    work(0)
    taken = []
    for turn in range(1, ROUNDS + 1):
        began = time.perf_counter()
        work(turn)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def aside_line(aside: Aside) -> str:
    """Which experts a CPU computes, and why."""
    choice = aside.choice
    if isinstance(choice, AtMost):
        return f"the CPU computes experts that at most {choice.tokens} tokens miss"
    assert isinstance(choice, BreakEven)  # there are no others on a command line
    return (
        f"the CPU computes experts that are missed where it is done sooner: a copy takes "
        f"{choice.copy * 1e3:.3g} ms; on the CPU a layer {choice.begin * 1e3:.3g} ms, an expert "
        f"{choice.each * 1e3:.3g} ms and each of its tokens {choice.token * 1e3:.3g} ms"
    )
