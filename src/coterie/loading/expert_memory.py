"""How much memory experts may have: what was asked for, and what that comes to on a machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from coterie.errors import CoterieError
from coterie.loading.low_precision import LowPrecisionExperts
from coterie.loading.saved_votes import SavedVotes
from coterie.model.size import model_size
from coterie.model.spec import ModelSpec
from coterie.offload.capacity import Capacity, parse_bytes
from coterie.offload.cpu_experts import TokenLimit, parse_cpu_experts
from coterie.offload.eviction import EVICTIONS, Eviction, Lru, parse_eviction
from coterie.specs import format_spec

Auto = Literal["auto"]

AUTO: Auto = "auto"
AUTO_KV_LENGTH = 2048  # positions of a row whose keys and values "auto" leaves room for
AUTO_MARGIN_BYTES = 512 << 20  # bytes that "auto" leaves for what a forward computes with
AUTO_SPARE_SHARE = 0.05  # and of what is free, the share that others may take meanwhile


@dataclass(frozen=True)
class ExpertMemoryConfig:
    """Memory for some of the experts, while the others stay where they were loaded from.

    ``fast`` is where they are computed from. On a GPU, ``host`` bytes of the machine's own memory
    stand between that and the disk; None leaves it to what the machine needs. ``eviction`` says who
    leaves fast memory, ``warm`` who is there from the start. With ``coarse`` a part of that memory
    is for experts in fewer bits.
    """

    capacity: Capacity | Auto
    host_memory: int | Auto | None = None
    eviction: Eviction = field(default_factory=Lru)
    warm_start: SavedVotes | None = None
    fallback_model: LowPrecisionExperts | None = None
    cpu_experts: TokenLimit | Auto | None = None  # whom a CPU beside a GPU computes; None: nobody
    simulated: bool = False  # all experts are there, and book is kept of what would have moved

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
        """From what is typed: "35%", "47" a layer, "6GiB" or "auto"; "20GiB" or "auto"; "lru";
        "off", "auto" or the most tokens of an expert."""
        option, other_forms = (
            ("--imagine-memory", "") if simulated else ("--expert-memory", ", or auto")
        )
        return ExpertMemoryConfig(
            AUTO if capacity.strip() == AUTO else Capacity.parse(capacity, option, other_forms),
            AUTO
            if host_memory == AUTO
            else None
            if host_memory is None
            else parse_bytes(host_memory, "--host-memory"),
            Lru() if eviction is None else parse_eviction(eviction),
            warm_start,
            fallback_model,
            None if cpu_experts is None else parse_cpu_experts(cpu_experts),
            simulated,
        )

    def to_dict(self) -> dict[str, object]:
        """As plain values, by the names of the options; what was not asked for is None."""
        return {
            "expert_memory": self.capacity if self.capacity == AUTO else self.capacity.text,
            "host_memory": self.host_memory,
            "eviction": format_spec(self.eviction, EVICTIONS),
            "warm": None if self.warm_start is None else self.warm_start.label,
            **({} if self.fallback_model is None else self.fallback_model.to_dict()),
            **(
                {}
                if self.cpu_experts is None
                else {
                    "cpu_experts": AUTO if self.cpu_experts == AUTO else self.cpu_experts.max_tokens
                }
            ),
            **({"imagined": True} if self.simulated else {}),
        }


@dataclass(frozen=True)
class ExpertMemoryPlan:
    """What a ``Memory`` came to: ``slots`` for the experts of each layer.

    ``free`` bytes were there and ``rest`` of them left for all else, where it was "auto" that
    chose. Behind a GPU's slots, ``host`` bytes of the machine's own memory are for experts; none
    where the slots hold all of them.
    """

    config: ExpertMemoryConfig
    slots: int
    experts: int
    layers: int
    expert_bytes: int
    free_bytes: int | None = None
    other_bytes: int | None = None
    host_bytes: int | None = None

    @property
    def holds_all(self) -> bool:
        """Whether "auto" found that all of them fit, or a GPU was given room for all: then there is
        nothing to fetch."""
        return self.slots == self.experts and (self.config.capacity == AUTO or self.host_bytes == 0)

    @property
    def slot_bytes(self) -> int:
        """Of all slots."""
        return self.slots * self.layers * self.expert_bytes

    @property
    def absent_bytes(self) -> int:
        """Bytes of the experts for which there are no slots."""
        return (self.experts - self.slots) * self.layers * self.expert_bytes


def plan_expert_memory(
    config: ExpertMemoryConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    expert_bytes: int,
    free_bytes: int | None,
) -> ExpertMemoryPlan:
    """The slots of each layer, where an expert weighs so much in fast memory and ``free`` bytes
    can be had there; raises CoterieError for less than one."""
    layers, experts = len(spec.moe_layers), spec.router.experts
    if config.capacity != AUTO:
        slots = config.capacity.slots(layers=layers, experts=experts, expert_bytes=expert_bytes)
        return ExpertMemoryPlan(config, slots, experts, layers, expert_bytes)
    if free_bytes is None:
        raise CoterieError(
            "--expert-memory auto: this system does not tell how much memory is free; "
            "say a share (35%), slots a layer (47) or bytes (6GiB)"
        )
    other_bytes = non_expert_bytes(spec, dtype, free_bytes)
    slots = min(experts, max(0, free_bytes - other_bytes) // (layers * expert_bytes))
    if slots < 1:
        raise CoterieError(
            f"--expert-memory auto: {free_bytes:,} bytes are free, all else needs {other_bytes:,}, and one "
            f"expert in each of {layers} layers {layers * expert_bytes:,} more"
        )
    return ExpertMemoryPlan(config, slots, experts, layers, expert_bytes, free_bytes, other_bytes)


def non_expert_bytes(spec: ModelSpec, dtype: torch.dtype, free_bytes: int) -> int:
    """Bytes beside the experts: other weights, keys and values of a long row, and a margin."""
    sizes = model_size(spec, dtype)
    weights = sizes.bytes - len(spec.moe_layers) * sizes.layer_expert_bytes
    kv_bytes = min(AUTO_KV_LENGTH, spec.max_length) * sizes.kv_bytes_per_token
    return weights + kv_bytes + AUTO_MARGIN_BYTES + int(AUTO_SPARE_SHARE * free_bytes)
