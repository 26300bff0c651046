"""Experts for the CPU next to a GPU: their slabs in host memory, and the break-even with copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from coterie import ops
from coterie.checkpoints.model_folder import ModelFolder
from coterie.errors import OffloadError
from coterie.files import opened
from coterie.loading.free_memory import free_memory
from coterie.model.weight_loader import map_tensor
from coterie.offload.cpu_experts import BreakEven
from coterie.offload.fetchers import ExpertFetcher
from coterie.ops import cpu
from coterie.ops.expert_layout import ExpertLayout
from coterie.values import Routing, Slab

HOST_DEVICE = torch.device("cpu")
TIMING_ROUNDS = 5
TIMED_EXPERTS = 8  # experts of the layer that is timed on the CPU
TOKENS_PER_EXPERT = 8
TIMED_COPIES = 16  # experts copied one after the other


def host_slabs(
    layout: ExpertLayout, blobs: Mapping[int, Tensor], model: ModelFolder
) -> dict[int, Slab]:
    """All experts of each layer in the CPU's fastest layout, given them all in host memory.

    The CPU kernels need a second copy, mapped from a packed checkpoint or packed now. Raises
    OffloadError if there is too little memory for it.
    """
    plain = {layer: layout.as_slab(blob, torch.arange(len(blob))) for layer, blob in blobs.items()}
    example = next(iter(plain.values()))
    if not cpu.is_available() or cpu.packed_format(example) is None:
        return plain
    extra_bytes = sum(blob.nbytes for blob in blobs.values())
    free_bytes = free_memory(HOST_DEVICE)
    if free_bytes is not None and extra_bytes > free_bytes:
        raise OffloadError(
            f"`cpu_experts`: the CPU kernels need {extra_bytes:,} more bytes of host memory for "
            f"their own expert layout, and {free_bytes:,} are free"
        )
    if model.spec.panels:
        return _mapped_slabs(model)
    return {layer: ops.pack(slab) for layer, slab in plain.items()}


def _mapped_slabs(model: ModelFolder) -> dict[int, Slab]:
    slabs = {}
    for layer, file, entry in model.packed_experts():
        with opened(file) as descriptor:
            packed = map_tensor(descriptor, entry)
        slabs[layer] = model.packed_slab(packed, torch.arange(len(packed)))
    return slabs


def measure_break_even(
    fetcher: ExpertFetcher,
    slabs: Mapping[int, Slab],
    expert_bytes: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> BreakEven:
    """Time copies and CPU layers on this machine, each alone; medians of a few rounds."""
    layer, slab = next(iter(slabs.items()))
    experts, hidden = len(slab.slot_of), slab.down.shape[1]
    timed_experts = min(TIMED_EXPERTS, experts)
    x = torch.randn(timed_experts * TOKENS_PER_EXPERT, hidden, device=device).to(dtype)

    def timed_layer(count: int, tokens: int) -> Callable[[int], object]:
        def work(repeat: int) -> object:
            # Different experts in each round, so that no CPU cache holds them.
            ids = (repeat * count + torch.arange(count).repeat_interleave(tokens)) % experts
            routing = _routing(ids[:, None].to(device), experts)
            return ops.run_experts(x[: len(ids)], routing, slab)

        return work

    copies = min(TIMED_COPIES, experts)
    target_slots = torch.empty(copies, expert_bytes, dtype=torch.uint8, device=device)
    copy_seconds = _copy_seconds(fetcher, layer, experts, target_slots)
    if timed_experts < 2:
        return BreakEven(copy_seconds, _median_seconds(timed_layer(1, 1)), 0.0, 0.0)
    one_expert, many_experts, full_experts = (
        _median_seconds(timed_layer(*shape))
        for shape in ((1, 1), (timed_experts, 1), (timed_experts, TOKENS_PER_EXPERT))
    )
    return BreakEven.from_timings(
        copy_seconds,
        one_expert=one_expert,
        many_experts=many_experts,
        full_experts=full_experts,
        experts=timed_experts,
        tokens=TOKENS_PER_EXPERT,
    )


def _copy_seconds(fetcher: ExpertFetcher, layer: int, experts: int, target_slots: Tensor) -> float:
    """Seconds per copy of an expert in a series of copies."""
    fetcher.mark_computed()  # earlier compute may still read the slots' memory

    def work(repeat: int) -> None:
        first = repeat * len(target_slots)
        fetcher.drain(
            [
                fetcher.fetch_async(layer, (first + offset) % experts, slot)
                for offset, slot in enumerate(target_slots)
            ]
        )

    return _median_seconds(work) / len(target_slots)


def _routing(ids: Tensor, experts: int) -> Routing:
    used = torch.zeros(experts, dtype=torch.bool, device=ids.device)
    return Routing(ids, torch.ones(ids.shape, device=ids.device), used, ids)


def _median_seconds(work: Callable[[int], object]) -> float:
    work(0)
    durations = []
    for repeat in range(1, TIMING_ROUNDS + 1):
        start = time.perf_counter()
        work(repeat)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)
