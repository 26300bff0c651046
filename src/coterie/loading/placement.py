"""Placements: where a model's experts are stored, and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from coterie import ops
from coterie.errors import OffloadError
from coterie.files import ProgressCallback
from coterie.loading.expert_memory import (
    AUTO,
    ExpertMemoryConfig,
    ExpertMemoryPlan,
    plan_expert_memory,
)
from coterie.loading.target import LoadTarget
from coterie.model.weights import expert_bytes, take_slab
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.offload.store import TrackedExpertStore


class Placement(Protocol):
    """Where the experts of one model are stored, and how they are loaded."""

    @property
    def plan(self) -> ExpertMemoryPlan | None:
        """The planned expert memory; None if none was requested."""
        ...

    def load(self, target: LoadTarget, on_progress: ProgressCallback | None) -> LoadedModel:
        """Allocate and read the weights, and build the expert store."""
        ...

    def describe(self) -> tuple[str, ...]:
        """Notes for the user, one line each."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """What a placement has loaded."""

    weights: dict[str, Tensor]
    store: TrackedExpertStore
    placement: Placement  # with what was measured while loading


@dataclass(frozen=True)
class Resident:
    """Every expert in the memory that it is computed from."""

    plan: ExpertMemoryPlan | None = None  # if memory was requested and all experts fit

    def load(self, target: LoadTarget, on_progress: ProgressCallback | None) -> LoadedModel:
        weights = target.load_weights(on_progress, experts=True)
        slabs = {
            layer: ops.prepare(take_slab(target.spec, layer, weights), release_source=True)
            for layer in target.spec.moe_layers
        }
        return LoadedModel(weights, ResidentExpertStore(slabs), self)

    def describe(self) -> tuple[str, ...]:
        if self.plan is None:
            return ()
        return (
            f"{self.plan.auto_note}all {self.plan.experts} experts per layer fit "
            f"({self.plan.slots_size})",
        )


@dataclass(frozen=True)
class Simulated:
    """Every expert in memory, and a smaller expert cache that only exists as a slot table."""

    plan: ExpertMemoryPlan

    @staticmethod
    def of(config: ExpertMemoryConfig, target: LoadTarget) -> Simulated:
        """Raises OffloadError for less than one expert, and for options of a real cache."""
        for option, is_given in (
            ("`capacity=auto`", config.capacity == AUTO),
            ("`host_memory`", config.host_memory is not None),
            ("`fallback_model`", config.fallback_model is not None),
            ("`cpu_experts`", config.cpu_experts is not None),
        ):
            if is_given:
                raise OffloadError(
                    f"{option} has no effect on a simulated cache; `expert_memory` makes a real one"
                )
        spec, dtype = target.spec, target.dtype
        size = expert_bytes(spec, dtype)
        return Simulated(
            plan_expert_memory(config, spec, dtype, expert_bytes=size, free_bytes=None)
        )

    def load(self, target: LoadTarget, on_progress: ProgressCallback | None) -> LoadedModel:
        plan, loaded = self.plan, Resident().load(target, on_progress)
        config = plan.config
        cache = CacheSimulator(plan.experts, plan.slots, config.eviction, config.warm_votes)
        store = SimulatedCacheStore(loaded.store, cache, plan.expert_bytes, target.device)
        for layer in target.spec.moe_layers:
            store.resident(layer)
        return replace(loaded, store=store, placement=self)

    def describe(self) -> tuple[str, ...]:
        return (f"{self.plan.summary} ({self.plan.slots_size}), simulated: all are loaded",)
