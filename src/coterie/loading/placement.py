"""Placements: where a model's experts are kept, and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from coterie import ops
from coterie.loading.expert_memory import ExpertMemoryPlan
from coterie.loading.target import LoadTarget, ProgressCallback
from coterie.model.weights import take_slab
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.store import TrackedExpertStore


class Placement(Protocol):
    """Where the experts of one model are kept.

    A placement is made by its static method ``of``, which plans it and raises OffloadError for
    options that have no effect or cannot be met.
    """

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
