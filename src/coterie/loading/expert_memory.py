"""How much memory experts get: the user's config, and the plan it leads to on a machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from coterie.errors import OffloadError
from coterie.loading.low_precision import LowPrecisionExperts
from coterie.loading.saved_votes import SavedVotes
from coterie.model.size import model_size
from coterie.model.spec import ModelSpec
from coterie.offload.capacity import Capacity, format_bytes, parse_bytes
from coterie.offload.cpu_experts import TokenLimit, parse_cpu_experts
from coterie.offload.eviction import EVICTIONS, Eviction, FloatArray, Lru, parse_eviction
from coterie.specs import format_spec

Auto = Literal["auto"]

AUTO: Auto = "auto"
AUTO_KV_LENGTH = 2048  # "auto" leaves room for the keys and values of so many positions
AUTO_MARGIN_BYTES = 512 << 20  # bytes that "auto" leaves for a forward's activations
AUTO_SPARE_SHARE = 0.05  # share of the free memory that "auto" leaves to other processes


@dataclass(frozen=True)
class ExpertMemoryConfig:
    """A cache for some of the experts; the others are fetched when they are used.

    ``capacity`` is the memory that experts are computed from. On a GPU, ``host_memory`` bytes of
    the host hold experts between the GPU and the disk; None means as many as are needed. With
    ``fallback_model``, part of ``capacity`` holds experts in lower precision.
    """

    capacity: Capacity | Auto
    host_memory: int | Auto | None = None
    eviction: Eviction = field(default_factory=Lru)
    warm_start: SavedVotes | None = None  # the top-voted experts are cached from the start
    fallback_model: LowPrecisionExperts | None = None
    cpu_experts: TokenLimit | Auto | None = None  # cache misses of a GPU that the CPU computes
    simulated: bool = False  # all experts are in memory, and the cache's loads are only counted

    @staticmethod
    def parse(
        capacity: str,
        *,
        host_memory: str | None = None,
        eviction: str | None = None,
        warm_start: SavedVotes | None = None,
        fallback_model: LowPrecisionExperts | None = None,
        cpu_experts: str | None = None,
        simulated: bool = False,
    ) -> ExpertMemoryConfig:
        """Parse the texts of the command line's options.

        ``capacity`` is "35%", "47" (slots per layer), "6GiB" or "auto"; ``host_memory`` "20GiB" or
        "auto"; ``eviction`` "lru"; ``cpu_experts`` "off", "auto" or a maximum number of tokens.
        """
        name, forms = "`expert_memory`", ", or auto"
        if simulated:
            name, forms = "`simulate_expert_memory`", ""
        host_bytes: int | Auto | None = AUTO
        if host_memory != AUTO:
            host_bytes = None if host_memory is None else parse_bytes(host_memory, "`host_memory`")
        return ExpertMemoryConfig(
            AUTO if capacity.strip() == AUTO else Capacity.parse(capacity, name, forms),
            host_bytes,
            parse_eviction(eviction or "lru"),
            warm_start,
            fallback_model,
            None if cpu_experts is None else parse_cpu_experts(cpu_experts),
            simulated,
        )

    @property
    def warm_votes(self) -> dict[int, FloatArray]:
        """The votes [E] of each layer that the cache starts from; empty without a warm start."""
        return {} if self.warm_start is None else self.warm_start.by_layer()

    def to_dict(self) -> dict[str, object]:
        """The config as JSON values, under the keys of saved runs."""
        config: dict[str, object] = {
            "expert_memory": self.capacity if self.capacity == AUTO else self.capacity.text,
            "host_memory": self.host_memory,
            "eviction": format_spec(self.eviction, EVICTIONS),
            "warm": None if self.warm_start is None else self.warm_start.label,
        }
        if self.fallback_model is not None:
            config |= self.fallback_model.to_dict()
        if self.cpu_experts is not None:
            limit = self.cpu_experts
            config["cpu_experts"] = AUTO if limit == AUTO else limit.max_tokens
        if self.simulated:
            config["imagined"] = True
        return config


@dataclass(frozen=True)
class ExpertMemoryPlan:
    """The slots per layer that a config leads to.

    ``auto_note`` is about the memory that "auto" found. On a GPU, ``host_bytes`` of the host hold
    experts; 0 if the slots hold all of them.
    """

    config: ExpertMemoryConfig
    slots: int
    experts: int
    layers: int
    expert_bytes: int
    auto_note: str = ""
    host_bytes: int | None = None

    @property
    def holds_all(self) -> bool:
        """Whether all experts fit, so that nothing is fetched.

        A CPU still fetches each expert once into slots for all, unless they come from "auto".
        """
        return self.slots == self.experts and (self.config.capacity == AUTO or self.host_bytes == 0)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots of all layers."""
        return self.slots * self.layers * self.expert_bytes

    @property
    def absent_bytes(self) -> int:
        """Bytes of the experts without a slot."""
        return self.total_bytes - self.slot_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the experts of all layers."""
        return self.experts * self.layers * self.expert_bytes

    @property
    def slots_size(self) -> str:
        return format_bytes(self.slot_bytes)

    @property
    def summary(self) -> str:
        count = f"{self.slots} of" if self.absent_bytes else "all"
        return f"{self.auto_note}{count} {self.experts} experts per layer in memory"


def plan_expert_memory(
    config: ExpertMemoryConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    expert_bytes: int,
    free_bytes: int | None,
) -> ExpertMemoryPlan:
    """The slots per layer for experts of ``expert_bytes``; raises for less than one.

    "auto" takes all of ``free_bytes`` that nothing else needs.
    """
    layers, experts = len(spec.moe_layers), spec.router.experts
    if config.capacity != AUTO:
        slots = config.capacity.slots(layers=layers, experts=experts, expert_bytes=expert_bytes)
        return ExpertMemoryPlan(config, slots, experts, layers, expert_bytes)
    if free_bytes is None:
        raise OffloadError(
            "`expert_memory=auto`: this system does not report its free memory; use a share "
            "(35%), slots per layer (47) or bytes (6GiB)"
        )
    other_bytes = non_expert_bytes(spec, dtype, free_bytes)
    slots = min(experts, max(0, free_bytes - other_bytes) // (layers * expert_bytes))
    if slots < 1:
        raise OffloadError(
            f"`expert_memory=auto`: {free_bytes:,} bytes are free, all else needs {other_bytes:,}, "
            f"and one expert in each of {layers} layers needs {layers * expert_bytes:,} more"
        )
    note = f"{format_bytes(free_bytes)} are free, {format_bytes(other_bytes)} kept for all else: "
    return ExpertMemoryPlan(config, slots, experts, layers, expert_bytes, note)


def non_expert_bytes(spec: ModelSpec, dtype: torch.dtype, free_bytes: int) -> int:
    """Bytes for all else: other weights, the KV cache of a long sequence, and margins."""
    sizes = model_size(spec, dtype)
    weights = sizes.bytes - len(spec.moe_layers) * sizes.layer_expert_bytes
    kv_bytes = min(AUTO_KV_LENGTH, spec.max_length) * sizes.kv_bytes_per_token
    return weights + kv_bytes + AUTO_MARGIN_BYTES + int(AUTO_SPARE_SHARE * free_bytes)
