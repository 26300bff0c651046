"""Experts in host memory behind a GPU's slots: all of them, or some before a packed checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import CoterieError
from coterie.loading.cpu_experts import host_slabs, measure_break_even
from coterie.loading.disk_offload import expert_file_spans
from coterie.loading.expert_memory import (
    AUTO,
    ExpertMemoryConfig,
    ExpertMemoryPlan,
    plan_expert_memory,
)
from coterie.loading.free_memory import free_memory
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.weights import TensorTarget
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.cpu_experts import CpuExperts
from coterie.offload.fetchers import ExpertFetcher
from coterie.offload.gpu_fetchers import CopyStream, PinnedCopyFetcher, StagedFetcher
from coterie.offload.host_cache import HostCache, host_cache_slots
from coterie.offload.pinned_memory import allocate_pinned
from coterie.offload.tiers import DiskTier, HostTier, Tier
from coterie.ops.cpu.experts import allocate as unpinned
from coterie.ops.expert_layout import ExpertLayout
from coterie.ops.packed_layout import slab_of_packed

HOST_DEVICE = torch.device("cpu")
HOST_SPARE_SHARE = 0.1  # of the host's free memory, what "auto" leaves to others


def has_device_memory(device: torch.device) -> bool:
    """Whether the device computes from memory of its own, into which experts are copied."""
    return device.type == "cuda"


def plan_gpu_offload(
    config: ExpertMemoryConfig,
    stored_spec: ModelSpec,
    loaded_spec: ModelSpec,
    dtype: torch.dtype,
    *,
    device: torch.device,
) -> ExpertMemoryPlan:
    """Slots on the device, and bytes of the host behind them; raises CoterieError for less than
    one expert there, and for experts that must all be in host memory and do not fit."""
    if config.fallback_model is not None:
        raise CoterieError("--coarse serves two precisions on a CPU only; leave it out here")
    expert_bytes = expert_layout(loaded_spec, dtype).size
    plan = plan_expert_memory(
        config, loaded_spec, dtype, expert_bytes=expert_bytes, free_bytes=free_memory(device)
    )
    if plan.slots == plan.experts:
        options = {
            "--cpu-experts": config.cpu_experts is not None,
            "--host-memory": config.host_memory is not None and config.capacity != AUTO,
        }
        for name, is_given in options.items():
            if is_given:
                raise CoterieError(f"{name} has no effect: all experts fit into the GPU's memory")
        return replace(plan, host_bytes=0)
    host_bytes = _plan_host_bytes(plan, packed=stored_spec.panels)
    if config.cpu_experts is not None and host_bytes < plan.layers * plan.experts * expert_bytes:
        raise CoterieError(
            "--cpu-experts computes experts out of host memory, which must hold all of them; "
            "leave out --host-memory"
        )
    return replace(plan, host_bytes=host_bytes)


def _plan_host_bytes(plan: ExpertMemoryPlan, *, packed: bool) -> int:
    """Of the host's memory, pinned, for experts."""
    total_bytes, free_bytes = (
        plan.layers * plan.experts * plan.expert_bytes,
        free_memory(HOST_DEVICE),
    )
    budget = plan.config.host_memory
    if budget == AUTO:
        budget = total_bytes if free_bytes is None else int((1 - HOST_SPARE_SHARE) * free_bytes)
    budget = total_bytes if budget is None else min(total_bytes, budget)
    if budget < total_bytes and not packed:
        raise CoterieError(
            f"all experts together weigh {total_bytes:,} bytes, more than the {budget:,} of host memory "
            "that they may have; `coterie quantize MODEL OUT` makes a packed checkpoint, whose "
            "experts can also be read one by one"
        )
    if free_bytes is not None and budget > free_bytes:
        raise CoterieError(
            f"{budget:,} bytes of host memory for experts, and {free_bytes:,} are free; "
            "give --host-memory less"
        )
    return budget


def expert_layout(spec: ModelSpec, dtype: torch.dtype) -> ExpertLayout:
    """How an expert of a model lies in a GPU's slot."""
    return ExpertLayout(spec.hidden, spec.expert_width, spec.expert_format or dtype)


@dataclass(frozen=True)
class GpuOffloadBuilder:
    """The host's part of a model whose experts a GPU computes with: where they lie, and the store
    that brings them."""

    spec: ModelSpec  # as the GPU has it
    dtype: torch.dtype
    memory_plan: ExpertMemoryPlan
    device: torch.device

    @cached_property
    def layout(self) -> ExpertLayout:
        return expert_layout(self.spec, self.dtype)

    @property
    def holds_all(self) -> bool:
        """Whether every expert is in host memory once the model is loaded."""
        return (
            self._host_bytes
            >= self.memory_plan.layers * self.memory_plan.experts * self.layout.size
        )

    @cached_property
    def _host_experts(self) -> Mapping[int, Tensor]:
        """Of each layer [E, bytes of an expert], pinned, to be filled."""
        experts, expert_bytes = self.memory_plan.experts, self.layout.size
        return {
            layer: allocate_pinned(experts, expert_bytes, self.device)
            for layer in self.spec.moe_layers
        }

    def weights(self) -> dict[str, Tensor]:
        """Where all experts lie, by the names of a checkpoint's places."""
        return {
            f"layers.{layer}.experts.{name}": view
            for layer, blob in self._host_experts.items()
            for name, view in self.layout.views(blob).items()
        }

    def build_store(
        self, checkpoint: Checkpoint, targets: Mapping[str, TensorTarget], stored_spec: ModelSpec
    ) -> CachedExpertStore:
        """With slots on the device, and in them who is there from the start."""
        config = self.memory_plan.config
        fetcher = self._fetcher(checkpoint, targets, stored_spec)
        store = CachedExpertStore(
            fetcher,
            self.layout.as_slab,
            lambda slots, size: torch.empty(slots, size, dtype=torch.uint8, device=self.device),
            experts=self.memory_plan.experts,
            expert_bytes=self.layout.size,
            capacity=self.memory_plan.slots,
            eviction=config.eviction,
            warm_votes={} if config.warm_start is None else config.warm_start.by_layer(),
            cpu_experts=self._cpu_experts(fetcher, checkpoint, targets, stored_spec),
        )
        for layer in self.spec.moe_layers:
            store.resident(layer)
        return store

    def _fetcher(
        self, checkpoint: Checkpoint, targets: Mapping[str, TensorTarget], stored_spec: ModelSpec
    ) -> ExpertFetcher:
        stream = CopyStream(self.device)
        if self.holds_all:
            return PinnedCopyFetcher(HostTier(self._host_experts), stream)
        layers, experts, expert_bytes = (
            self.spec.moe_layers,
            self.memory_plan.experts,
            self.layout.size,
        )
        backing_tier = UnpackingTier(
            DiskTier(expert_file_spans(checkpoint, targets)), stored_spec, self.layout
        )
        slots = host_cache_slots(
            self._host_bytes, layers=len(layers), experts=experts, expert_bytes=expert_bytes
        )
        return StagedFetcher(
            HostCache(
                backing_tier, allocate_pinned(slots, expert_bytes, self.device), layers, experts
            ),
            stream,
        )

    def _cpu_experts(
        self,
        fetcher: ExpertFetcher,
        checkpoint: Checkpoint,
        targets: Mapping[str, TensorTarget],
        stored_spec: ModelSpec,
    ) -> CpuExperts | None:
        """The CPU's part, where one was asked for."""
        selection = self.memory_plan.config.cpu_experts
        if selection is None or not isinstance(fetcher, PinnedCopyFetcher):
            return None
        slabs = host_slabs(self.layout, self._host_experts, checkpoint, targets, stored_spec)
        if selection == AUTO:
            selection = measure_break_even(
                fetcher, slabs, self.layout.size, dtype=self.dtype, device=self.device
            )
        return CpuExperts(selection, slabs)

    @property
    def _host_bytes(self) -> int:
        return self.memory_plan.host_bytes or 0


@dataclass(frozen=True)
class UnpackingTier:
    """Another tier's experts, which are packed for a CPU, as a GPU reads them."""

    backing_tier: Tier
    stored_spec: ModelSpec  # of what is packed
    layout: ExpertLayout
    _buffers: threading.local = field(default_factory=threading.local)

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        with torch.inference_mode():
            if not hasattr(self._buffers, "own"):
                self._buffers.own = unpinned(1, self.stored_spec.expert_stride)
            packed: Tensor = self._buffers.own
            tier = self.backing_tier.fetch(layer, expert, packed[0])
            sizes = {"hidden": self.stored_spec.hidden, "width": self.stored_spec.expert_width}
            slab = slab_of_packed(
                packed, self.stored_spec.panel_kind, torch.zeros(1).long(), **sizes
            )
            self.layout.fill(target[None], ops.unpack(slab))
            return tier
