"""The placement of a GPU: experts in host memory, some of them cached in GPU slots."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coterie import ops
from coterie.checkpoints.model_folder import ModelFolder
from coterie.errors import OffloadError
from coterie.files import ProgressCallback
from coterie.loading.cpu_experts import host_slabs, measure_break_even
from coterie.loading.disk_offload import expert_file_spans
from coterie.loading.expert_memory import (
    AUTO,
    ExpertMemoryConfig,
    ExpertMemoryPlan,
    plan_expert_memory,
)
from coterie.loading.free_memory import free_memory
from coterie.loading.placement import LoadedModel
from coterie.loading.target import LoadTarget
from coterie.model.spec import ModelSpec
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.capacity import format_bytes
from coterie.offload.cpu_experts import CpuExperts, CpuSelection
from coterie.offload.fetchers import ExpertFetcher
from coterie.offload.gpu_fetchers import CopyStream, GpuFetcher
from coterie.offload.host_cache import HostCache
from coterie.offload.pinned_memory import allocate_pinned
from coterie.offload.tiers import DiskTier, HostTier, Tier
from coterie.ops.cpu.experts import allocate as allocate_panels
from coterie.ops.expert_layout import ExpertLayout

HOST_DEVICE = torch.device("cpu")
HOST_SPARE_SHARE = 0.1  # share of the free host memory that "auto" leaves to other processes


@dataclass(frozen=True)
class HostOffload:
    """Experts in pinned host memory (all, or a cache in front of the disk), some in GPU slots."""

    plan: ExpertMemoryPlan
    layout: ExpertLayout  # of an expert in host memory and in a GPU slot
    cpu_selection: CpuSelection | None = None  # known once loaded

    @staticmethod
    def of(config: ExpertMemoryConfig, target: LoadTarget) -> HostOffload:
        """Raises OffloadError for less than one expert on the GPU, for experts that do not fit into
        host memory, and for options that have no effect."""
        if config.fallback_model is not None:
            raise OffloadError("`fallback_model` works on a CPU only")
        layout = expert_layout(target.spec, target.dtype)
        free_bytes = free_memory(target.device)
        plan = plan_expert_memory(
            config, target.spec, target.dtype, expert_bytes=layout.size, free_bytes=free_bytes
        )
        if plan.slots == plan.experts:
            _check_no_host_options(config)
            return HostOffload(replace(plan, host_bytes=0), layout)
        host_bytes = _plan_host_bytes(plan, packed=target.model.spec.panels)
        if config.cpu_experts is not None and host_bytes < plan.total_bytes:
            raise OffloadError(
                "`cpu_experts` needs all experts in host memory; leave out `host_memory`"
            )
        return HostOffload(replace(plan, host_bytes=host_bytes), layout)

    def load(self, target: LoadTarget, on_progress: ProgressCallback | None) -> LoadedModel:
        plan, blobs = self.plan, dict[int, Tensor]()

        def allocate_host() -> dict[str, Tensor]:
            for layer in target.spec.moe_layers:
                blobs[layer] = allocate_pinned(plan.experts, self.layout.size, target.device)
            return {
                f"layers.{layer}.experts.{name}": view
                for layer, blob in blobs.items()
                for name, view in self.layout.views(blob).items()
            }

        weights = target.load_weights(
            on_progress,
            experts=False,
            absent_bytes=plan.absent_bytes,
            host_experts=allocate_host if self._host_holds_all else None,
        )
        fetcher = self._fetcher(target, blobs)
        cpu_experts = self._cpu_experts(target, fetcher, blobs)
        store = CachedExpertStore(
            fetcher,
            self.layout.as_slab,
            lambda slots, size: torch.empty(slots, size, dtype=torch.uint8, device=target.device),
            experts=plan.experts,
            expert_bytes=self.layout.size,
            capacity=plan.slots,
            eviction=plan.config.eviction,
            warm_votes=plan.config.warm_votes,
            cpu_experts=cpu_experts,
        )
        for layer in target.spec.moe_layers:
            store.layer_cache(layer)
        selection = None if cpu_experts is None else cpu_experts.selection
        return LoadedModel(weights, store, replace(self, cpu_selection=selection))

    def describe(self) -> tuple[str, ...]:
        others = "all" if self._host_holds_all else "some, in front of the disk,"
        host_size = format_bytes(self.plan.host_bytes or 0)
        note = (
            f"{self.plan.summary} of the GPU ({self.plan.slots_size}), {others} in {host_size} of "
            "host memory"
        )
        return (note,) if self.cpu_selection is None else (note, self.cpu_selection.describe())

    @property
    def _host_holds_all(self) -> bool:
        return (self.plan.host_bytes or 0) >= self.plan.total_bytes

    def _fetcher(self, target: LoadTarget, blobs: Mapping[int, Tensor]) -> ExpertFetcher:
        stream = CopyStream(target.device)
        if self._host_holds_all:
            return GpuFetcher(HostTier(blobs), stream)
        size = self.layout.size
        disk = UnpackingTier(DiskTier(expert_file_spans(target.model)), target.model, self.layout)
        memory = allocate_pinned((self.plan.host_bytes or 0) // size, size, target.device)
        return GpuFetcher(HostCache(disk, memory), stream)

    def _cpu_experts(
        self, target: LoadTarget, fetcher: ExpertFetcher, blobs: Mapping[int, Tensor]
    ) -> CpuExperts | None:
        selection = self.plan.config.cpu_experts
        if selection is None:
            return None
        slabs = host_slabs(self.layout, blobs, target.model)
        if selection == AUTO:
            selection = measure_break_even(
                fetcher, slabs, self.layout.size, dtype=target.dtype, device=target.device
            )
        return CpuExperts(selection, slabs)


def expert_layout(spec: ModelSpec, dtype: torch.dtype) -> ExpertLayout:
    """The layout of one expert in a GPU slot."""
    return ExpertLayout(spec.hidden, spec.expert_width, spec.expert_format or dtype)


def _check_no_host_options(config: ExpertMemoryConfig) -> None:
    options = {
        "cpu_experts": config.cpu_experts is not None,
        "host_memory": config.host_memory is not None and config.capacity != AUTO,
    }
    for name, is_given in options.items():
        if is_given:
            raise OffloadError(f"`{name}` has no effect: all experts fit into the GPU's memory")


def _plan_host_bytes(plan: ExpertMemoryPlan, *, packed: bool) -> int:
    """Bytes of pinned host memory for experts."""
    total_bytes, free_bytes = plan.total_bytes, free_memory(HOST_DEVICE)
    budget = plan.config.host_memory
    if budget == AUTO:
        budget = total_bytes if free_bytes is None else int((1 - HOST_SPARE_SHARE) * free_bytes)
    budget = total_bytes if budget is None else min(total_bytes, budget)
    if budget < plan.expert_bytes:
        raise OffloadError(
            f"`host_memory`: {budget:,} bytes are less than one expert of {plan.expert_bytes:,}"
        )
    if budget < total_bytes and not packed:
        raise OffloadError(
            f"all experts together need {total_bytes:,} bytes, more than the {budget:,} of "
            "`host_memory`; single experts can be fetched from a packed checkpoint, which "
            "`coterie quantize` makes"
        )
    if free_bytes is not None and budget > free_bytes:
        raise OffloadError(
            f"experts need {budget:,} bytes of host memory, and {free_bytes:,} are free; choose a "
            "smaller `host_memory`"
        )
    return budget


@dataclass(frozen=True)
class UnpackingTier:
    """Another tier's experts, converted from the CPU kernels' layout to that of a GPU slot."""

    backing_tier: Tier
    model: ModelFolder
    layout: ExpertLayout
    _buffers: threading.local = field(default_factory=threading.local)

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        with torch.inference_mode():
            if not hasattr(self._buffers, "packed"):
                self._buffers.packed = allocate_panels(1, self.model.spec.expert_stride)
            packed: Tensor = self._buffers.packed
            tier = self.backing_tier.fetch(layer, expert, packed[0])
            slab = self.model.packed_slab(packed, torch.zeros(1, dtype=torch.int64))
            self.layout.fill(target[None], ops.unpack(slab))
            return tier
