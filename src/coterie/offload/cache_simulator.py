"""A memory on paper: what slots of every layer would have moved for uses that are known."""

from __future__ import annotations

from dataclasses import dataclass, field

from coterie.offload.eviction import Eviction, FloatArray, Lru, Mask
from coterie.offload.slot_table import Slots


@dataclass  # not frozen: it is written
class CacheSimulator:
    """Slots for ``capacity`` experts of each layer, and who went in and out of them.

    It knows no weights. Where a policy does not ask who is there, the same uses can be entered into
    books of many capacities, and each says what a memory of that size would have moved.
    """

    experts: int
    capacity: int
    eviction: Eviction = field(default_factory=Lru)
    slots: dict[int, Slots] = field(default_factory=dict)

    def count_loads(self, layer: int, used: Mask, votes: FloatArray | None = None) -> int:
        """A forward of a layer computes with these [E]: how many of them must come."""
        if layer not in self.slots:
            self.slots[layer] = Slots(self.experts, self.capacity, self.eviction)
        return sum(len(wave.loads) for wave in self.slots[layer].serve(used, votes))
