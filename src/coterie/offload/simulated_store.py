"""A smaller memory, imagined: every expert is there, and book is kept of what would have moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coterie.offload.eviction import Eviction, FloatArray, Lru, eviction_votes
from coterie.offload.slot_table import Slots
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertRequest, ExpertStore, Slab

SIMULATED_TIER = "imagined"  # what nobody moved comes from there


@dataclass  # not frozen: it keeps book
class SimulatedCacheStore:
    """Another store's experts, and slots for ``capacity`` of each layer's that exist on paper.

    Policies are told who would be in fast memory, so that they elect and answer as they would
    there. Reading who is used waits for the device. One row at a time, as a replay of one does.
    """

    backing_store: ExpertStore
    experts: int
    capacity: int
    eviction: Eviction = field(default_factory=Lru)
    warm_votes: Mapping[int, FloatArray] = field(
        default_factory=dict
    )  # votes [E] of earlier runs, by layer
    expert_bytes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where votes are
    traffic_log: TrafficLog = field(init=False)
    caches: dict[int, Slots] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.traffic_log = TrafficLog(
            self.expert_bytes, lambda layer: self._new_slots(layer, Lru())
        )

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        used_mask = request.used.cpu().numpy()
        cache = self._cache(layer)
        used, hits = np.count_nonzero(used_mask), np.count_nonzero(used_mask & cache.resident)
        self.traffic_log.log_layer(layer, request, used=int(used), hits=int(hits))
        waves = cache.serve(used_mask, eviction_votes(self.eviction, request))
        self.traffic_log.log_transfer(SIMULATED_TIER, sum(len(wave.loads) for wave in waves))
        yield from self.backing_store.serve(layer, request)

    @property
    def experts_used(self) -> int:
        """Experts asked for so far."""
        return self.traffic_log.traffic().experts_used

    @property
    def experts_moved(self) -> int:
        """Experts that would have come so far."""
        return self.traffic_log.traffic().experts_moved

    def reset(self) -> None:
        """Forget who is here; those of the start come back."""
        self.traffic_log.log_reset()
        layers = tuple(self.caches)
        self.caches.clear()
        for layer in layers:
            self._cache(layer)

    def resident(self, layer: int) -> Tensor | None:
        return torch.from_numpy(self._cache(layer).resident).to(self.device)

    def slots(self, layer: int) -> int | None:
        del layer
        return self.capacity

    def _cache(self, layer: int) -> Slots:
        if layer not in self.caches:
            self.caches[layer] = cache = self._new_slots(layer, self.eviction)
            self.traffic_log.log_transfer(SIMULATED_TIER, int(cache.resident.sum()))
        return self.caches[layer]

    def _new_slots(self, layer: int, eviction: Eviction) -> Slots:
        return Slots(self.experts, self.capacity, eviction, self.warm_votes.get(layer))
