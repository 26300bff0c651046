"""Experts in host memory behind a GPU's slots: all of them, or some before a packed checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.beside import host_slabs, measured
from coterie.engine.memory import AUTO, Memory, Settled, settle
from coterie.engine.offloaded import blobs
from coterie.engine.room import free_memory
from coterie.experts.aside import Aside
from coterie.experts.couriers import Courier
from coterie.experts.host import Host, host_slots
from coterie.experts.offload import Offloaded
from coterie.experts.pinned import pinned
from coterie.experts.streams import Copies, Lane, Relays
from coterie.experts.tiers import InMemory, OnDisk, Tier
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.weights import Place
from coterie.naming import CoterieError
from coterie.ops.blobs import Layout
from coterie.ops.cpu.kernels import memory as unpinned
from coterie.ops.panels import in_panels

HOST = torch.device("cpu")
LEFT = 0.1  # of the host's free memory, what "auto" leaves to others


def far(device: torch.device) -> bool:
    """Whether the device computes from memory of its own, into which experts are copied."""
    return device.type == "cuda"


def settle_behind(
    asked: Memory, stored: ModelSpec, kept: ModelSpec, dtype: torch.dtype, *, device: torch.device
) -> Settled:
    """Slots on the device, and bytes of the host behind them; raises CoterieError for less than
    one expert there, and for experts that must all be in host memory and do not fit."""
    if asked.coarse is not None:
        raise CoterieError("--coarse serves two precisions on a CPU only; leave it out here")
    size = layout_of(kept, dtype).size
    found = settle(asked, kept, dtype, expert_bytes=size, free=free_memory(device))
    if found.slots == found.experts:
        asked_for = {
            "--cpu-experts": asked.aside is not None,
            "--host-memory": asked.host is not None and asked.fast != AUTO,
        }
        for name, there in asked_for.items():
            if there:
                raise CoterieError(f"{name} has no effect: all experts fit into the GPU's memory")
        return replace(found, host=0)
    host = _host_bytes(found, packed=stored.panels)
    if asked.aside is not None and host < found.layers * found.experts * size:
        raise CoterieError(
            "--cpu-experts computes experts out of host memory, which must hold all of them; "
            "leave out --host-memory"
        )
    return replace(found, host=host)


def _host_bytes(found: Settled, *, packed: bool) -> int:
    """Of the host's memory, pinned, for experts."""
    whole, free = found.layers * found.experts * found.expert_bytes, free_memory(HOST)
    wanted = found.asked.host
    if wanted == AUTO:
        wanted = whole if free is None else int((1 - LEFT) * free)
    wanted = whole if wanted is None else min(whole, wanted)
    if wanted < whole and not packed:
        raise CoterieError(
            f"all experts together weigh {whole:,} bytes, more than the {wanted:,} of host memory "
            "that they may have; `coterie quantize MODEL OUT` makes a packed checkpoint, whose "
            "experts can also be read one by one"
        )
    if free is not None and wanted > free:
        raise CoterieError(
            f"{wanted:,} bytes of host memory for experts, and {free:,} are free; "
            "give --host-memory less"
        )
    return wanted


def layout_of(spec: ModelSpec, dtype: torch.dtype) -> Layout:
    """How an expert of a model lies in a GPU's slot."""
    return Layout(spec.hidden, spec.expert_width, spec.expert_format or dtype)


@dataclass(frozen=True)
class Behind:
    """The host's part of a model whose experts a GPU computes with: where they lie, and the store
    that brings them."""

    spec: ModelSpec  # as the GPU has it
    dtype: torch.dtype
    memory: Settled
    device: torch.device

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.spec, self.dtype)

    @property
    def holds_all(self) -> bool:
        """Whether every expert is in host memory once the model is loaded."""
        return self._host >= self.memory.layers * self.memory.experts * self.layout.size

    @cached_property
    def _blobs(self) -> Mapping[int, Tensor]:
        """Of each layer [E, bytes of an expert], pinned, to be filled."""
        experts, size = self.memory.experts, self.layout.size
        return {layer: pinned(experts, size, self.device) for layer in self.spec.moe_layers}

    def weights(self) -> dict[str, Tensor]:
        """Where all experts lie, by the names of a checkpoint's places."""
        return {
            f"layers.{layer}.experts.{name}": view
            for layer, blob in self._blobs.items()
            for name, view in self.layout.views(blob).items()
        }

    def store(
        self, checkpoint: Checkpoint, places: Mapping[str, Place], stored: ModelSpec
    ) -> Offloaded:
        """With slots on the device, and in them who is there from the start."""
        asked = self.memory.asked
        courier = self._courier(checkpoint, places, stored)
        store = Offloaded(
            courier,
            self.layout.shown,
            lambda slots, size: torch.empty(slots, size, dtype=torch.uint8, device=self.device),
            experts=self.memory.experts,
            expert_bytes=self.layout.size,
            capacity=self.memory.slots,
            rule=asked.eviction,
            warm={} if asked.warm is None else asked.warm.by_layer(),
            aside=self._aside(courier, checkpoint, places, stored),
        )
        for layer in self.spec.moe_layers:
            store.resident(layer)
        return store

    def _courier(
        self, checkpoint: Checkpoint, places: Mapping[str, Place], stored: ModelSpec
    ) -> Courier:
        lane = Lane(self.device)
        if self.holds_all:
            return Copies(InMemory(self._blobs), lane)
        layers, experts, size = self.spec.moe_layers, self.memory.experts, self.layout.size
        below = Unpacked(OnDisk(blobs(checkpoint, places)), stored, self.layout)
        slots = host_slots(self._host, layers=len(layers), experts=experts, size=size)
        return Relays(Host(below, pinned(slots, size, self.device), layers, experts), lane)

    def _aside(
        self,
        courier: Courier,
        checkpoint: Checkpoint,
        places: Mapping[str, Place],
        stored: ModelSpec,
    ) -> Aside | None:
        """The CPU's part, where one was asked for."""
        choice = self.memory.asked.aside
        if choice is None or not isinstance(courier, Copies):
            return None
        slabs = host_slabs(self.layout, self._blobs, checkpoint, places, stored)
        if choice == AUTO:
            choice = measured(
                courier, slabs, self.layout.size, dtype=self.dtype, device=self.device
            )
        return Aside(choice, slabs)

    @property
    def _host(self) -> int:
        return self.memory.host or 0


@dataclass(frozen=True)
class Unpacked:
    """Another tier's experts, which are packed for a CPU, as a GPU reads them."""

    below: Tier
    spec: ModelSpec  # of what is packed
    layout: Layout
    _buffers: threading.local = field(default_factory=threading.local)

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        with torch.inference_mode():
            if not hasattr(self._buffers, "own"):
                self._buffers.own = unpinned(1, self.spec.expert_stride)
            packed: Tensor = self._buffers.own
            found = self.below.fetch(layer, expert, packed[0])
            sizes = {"hidden": self.spec.hidden, "width": self.spec.expert_width}
            slab = in_panels(packed, self.spec.panel_kind, torch.zeros(1).long(), **sizes)
            self.layout.fill(into[None], ops.unpack(slab))
            return found
