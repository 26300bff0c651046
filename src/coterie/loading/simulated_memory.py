"""The placement that simulates an expert cache: all experts are in memory, loads are counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from coterie.errors import OffloadError
from coterie.loading.expert_memory import (
    AUTO,
    ExpertMemoryConfig,
    ExpertMemoryPlan,
    plan_expert_memory,
)
from coterie.loading.placement import LoadedModel, Resident
from coterie.loading.target import LoadTarget, ProgressCallback
from coterie.model.spec import ModelSpec
from coterie.model.weights import expert_bytes
from coterie.offload.simulated_store import SimulatedCacheStore
from coterie.values import ExpertStore


@dataclass(frozen=True)
class Simulated:
    """Every expert in memory, and a smaller expert cache that only exists as a slot table."""

    plan: ExpertMemoryPlan

    @staticmethod
    def of(config: ExpertMemoryConfig, spec: ModelSpec, dtype: torch.dtype) -> Simulated:
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
        size = expert_bytes(spec, dtype)
        return Simulated(
            plan_expert_memory(config, spec, dtype, expert_bytes=size, free_bytes=None)
        )

    def load(self, target: LoadTarget, on_progress: ProgressCallback | None) -> LoadedModel:
        loaded = Resident().load(target, on_progress)
        store = self.simulate(loaded.store, target.spec, target.device)
        return replace(loaded, store=store, placement=self)

    def simulate(
        self, store: ExpertStore, spec: ModelSpec, device: torch.device
    ) -> SimulatedCacheStore:
        """A store that serves from ``store`` and simulates the planned cache."""
        simulated = SimulatedCacheStore(
            store,
            self.plan.experts,
            self.plan.slots,
            self.plan.config.eviction,
            warm_votes=self.plan.config.warm_votes,
            expert_bytes=self.plan.expert_bytes,
            device=device,
        )
        for layer in spec.moe_layers:
            simulated.resident(layer)
        return simulated

    def describe(self) -> tuple[str, ...]:
        return (f"{self.plan.summary} ({self.plan.slots_size}) simulated; in fact all are",)
