"""The CPU beside a GPU: experts as its kernels read them, and what one costs here and there."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import CoterieError
from coterie.loading.free_memory import free_memory
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.weight_loader import map_tensor
from coterie.model.weights import TensorTarget, is_packed
from coterie.offload.cpu_experts import BreakEven, CpuExperts, TokenLimit
from coterie.offload.fetchers import ExpertFetcher
from coterie.ops import cpu
from coterie.ops.expert_layout import ExpertLayout
from coterie.ops.packed_layout import slab_of_packed
from coterie.values import Routing, Slab

HOST_DEVICE = torch.device("cpu")
TIMING_ROUNDS = 5
TIMED_EXPERTS, TOKENS_PER_EXPERT = (
    8,
    8,
)  # of a layer on the CPU that is timed, and of each of its experts
TIMED_COPIES = 16  # experts that are copied one after the other


def host_slabs(
    layout: ExpertLayout,
    host_experts: Mapping[int, Tensor],
    checkpoint: Checkpoint,
    targets: Mapping[str, TensorTarget],
    stored_spec: ModelSpec,
) -> dict[int, Slab]:
    """All experts of each layer as a CPU computes them best, from ``blobs`` that hold them all.

    Where kernels take them, in memory of their own: mapped from a packed checkpoint, or packed
    here. Raises CoterieError where there is none.
    """
    plain = {
        layer: layout.as_slab(blob, torch.arange(len(blob))) for layer, blob in host_experts.items()
    }
    example = next(iter(plain.values()))
    if not cpu.is_available() or cpu.packed_format(example) is None:
        return plain
    extra_bytes, free_bytes = (
        sum(blob.nbytes for blob in host_experts.values()),
        free_memory(HOST_DEVICE),
    )
    if free_bytes is not None and extra_bytes > free_bytes:
        raise CoterieError(
            "--cpu-experts: the kernels of a CPU read experts in another order, for which "
            f"{extra_bytes:,} bytes more of host memory are needed, and {free_bytes:,} are free"
        )
    if stored_spec.panels:
        return _mapped_slabs(checkpoint, targets, stored_spec)
    return {layer: ops.pack(slab) for layer, slab in plain.items()}


def _mapped_slabs(
    checkpoint: Checkpoint, targets: Mapping[str, TensorTarget], stored_spec: ModelSpec
) -> dict[int, Slab]:
    slabs = {}
    for file, entries in checkpoint.files.items():
        for name, entry in entries.items():
            target = targets[name].weight
            if not is_packed(target):
                continue
            descriptor = os.open(file, os.O_RDONLY)
            try:
                packed = map_tensor(descriptor, entry)
            finally:
                os.close(descriptor)
            sizes = {"hidden": stored_spec.hidden, "width": stored_spec.expert_width}
            all_ids = torch.arange(len(packed))
            slab = slab_of_packed(packed, stored_spec.panel_kind, all_ids, **sizes)
            slabs[int(target.split(".")[1])] = slab
    return slabs


def measure_break_even(
    fetcher: ExpertFetcher,
    slabs: Mapping[int, Slab],
    expert_bytes: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> BreakEven:
    """What copies of so many bytes and computing take on this machine, each alone; medians of a few
    rounds."""
    layer, slab = next(iter(slabs.items()))
    experts, hidden = len(slab.slot_of), slab.down.shape[1]
    timed_experts = min(TIMED_EXPERTS, experts)
    x = torch.randn(timed_experts * TOKENS_PER_EXPERT, hidden, device=device).to(dtype)

    def timed_layer(count: int, tokens: int) -> Callable[[int], object]:
        def work(repeat: int) -> object:
            # Others every time, so that no cache holds them.
            ids = (repeat * count + torch.arange(count).repeat_interleave(tokens)) % experts
            routing = _routing(ids[:, None].to(device), experts)
            return ops.run_experts(x[: len(ids)], routing, slab)

        return work

    target_slots = torch.empty(
        min(TIMED_COPIES, experts), expert_bytes, dtype=torch.uint8, device=device
    )
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
    """Seconds to copy an expert while others wait to be."""
    fetcher.mark_computed()  # with what lay there before

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


def describe_cpu_experts(cpu_experts: CpuExperts) -> str:
    """Which experts a CPU computes, and why."""
    selection = cpu_experts.selection
    if isinstance(selection, TokenLimit):
        return f"the CPU computes experts that at most {selection.max_tokens} tokens miss"
    assert isinstance(selection, BreakEven)  # there are no others on a command line
    return (
        f"the CPU computes experts that are missed where it is done sooner: a copy takes "
        f"{selection.copy_seconds * 1e3:.3g} ms; on the CPU a layer {selection.layer_seconds * 1e3:.3g} ms, an expert "
        f"{selection.expert_seconds * 1e3:.3g} ms and each of its tokens {selection.token_seconds * 1e3:.3g} ms"
    )
