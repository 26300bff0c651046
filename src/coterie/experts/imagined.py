"""A smaller memory, imagined: every expert is there, and book is kept of what would have moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.experts.eviction import Eviction, Lru
from coterie.experts.slots import Slots
from coterie.values import Demand, Slab, Store


@dataclass  # not frozen: it keeps book
class Imagined:
    """Another store's experts, and slots for ``capacity`` of each layer's that exist on paper.

    Policies are told who would be in fast memory, so that they elect and answer as they would
    there. Reading who is used waits for the device. One row at a time, as a replay of one does.
    """

    store: Store
    experts: int
    capacity: int
    rule: Eviction = field(default_factory=Lru)
    used: int = 0  # of all forwards and layers so far
    moved: int = 0
    books: dict[int, Slots] = field(default_factory=dict)

    def serve(self, layer: int, demand: Demand) -> Iterator[Slab]:
        mask = demand.used.cpu().numpy()
        waves = self._layer(layer).serve(mask)
        self.used += int(mask.sum())
        self.moved += sum(len(wave.loads) for wave in waves)
        yield from self.store.serve(layer, demand)

    def resident(self, layer: int) -> Tensor | None:
        return torch.from_numpy(self._layer(layer).resident)

    def slots(self, layer: int) -> int | None:
        del layer
        return self.capacity

    def _layer(self, layer: int) -> Slots:
        return self.books.setdefault(layer, Slots(self.experts, self.capacity, self.rule))
