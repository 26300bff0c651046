"""A simulated expert cache: all experts are in memory, and loads are only counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coterie.offload.eviction import Eviction, FloatArray, Lru, Mask, eviction_votes
from coterie.offload.slot_table import Slots
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertRequest, ExpertStore, Slab

SIMULATED_TIER = "imagined"  # the tier that simulated loads are logged under


@dataclass  # not frozen: its slots change with every forward
class CacheSimulator:
    """The slots of a cache with ``capacity`` experts per layer, without weights.

    If routing does not depend on what is cached, simulators of several capacities may count the
    loads of the same forwards.
    """

    experts: int
    capacity: int
    eviction: Eviction = field(default_factory=Lru)
    warm_votes: Mapping[int, FloatArray] = field(default_factory=dict)  # [E] by layer
    layers: dict[int, Slots] = field(init=False, default_factory=dict)

    def slots(self, layer: int) -> Slots:
        """The layer's slots, made at first use."""
        if layer not in self.layers:
            self.layers[layer] = self.new_slots(layer, self.eviction)
        return self.layers[layer]

    def new_slots(self, layer: int, eviction: Eviction) -> Slots:
        return Slots(self.experts, self.capacity, eviction, self.warm_votes.get(layer))

    def count_loads(self, layer: int, used: Mask, votes: FloatArray | None = None) -> int:
        """Serve one forward of a layer that uses these experts [E]; returns the loads it needs."""
        return sum(len(wave.loads) for wave in self.slots(layer).serve(used, votes))


@dataclass  # not frozen: its slots change with every forward
class SimulatedCacheStore:
    """Serves another store's experts and counts the loads of a smaller, simulated cache.

    Policies see the simulated cache as the resident experts, so they select and answer as with a
    real cache of that size. ``serve`` reads the used experts on the host, which waits for a device.
    """

    backing_store: ExpertStore
    cache: CacheSimulator
    expert_bytes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    traffic_log: TrafficLog = field(init=False)

    precision_stats = None

    def __post_init__(self) -> None:
        self.traffic_log = TrafficLog(
            self.expert_bytes, lambda layer: self.cache.new_slots(layer, Lru())
        )

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        used_mask, resident = request.used.cpu().numpy(), self._slots(layer).resident
        used, hits = np.count_nonzero(used_mask), np.count_nonzero(used_mask & resident)
        self.traffic_log.log_layer(layer, request, used=int(used), hits=int(hits))
        votes = eviction_votes(self.cache.eviction, request)
        self._log_loads(self.cache.count_loads(layer, used_mask, votes))
        yield from self.backing_store.serve(layer, request)

    def reset(self) -> None:
        """Empty the simulated cache, and count the warm-start experts again."""
        self.traffic_log.log_reset()
        layers = tuple(self.cache.layers)
        self.cache.layers.clear()
        for layer in layers:
            self._slots(layer)

    def resident(self, layer: int) -> Tensor | None:
        return torch.from_numpy(self._slots(layer).resident).to(self.device)

    def _slots(self, layer: int) -> Slots:
        if layer not in self.cache.layers:
            self._log_loads(self.cache.slots(layer).num_resident)
        return self.cache.slots(layer)

    def _log_loads(self, count: int) -> None:
        self.traffic_log.log_transfer(SIMULATED_TIER, count)
