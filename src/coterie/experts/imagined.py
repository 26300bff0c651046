"""A smaller memory, imagined: every expert is there, and book is kept of what would have moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coterie.experts.eviction import Eviction, Lru, Numbers, asked_votes
from coterie.experts.ledger import Ledger
from coterie.experts.slots import Slots
from coterie.values import Demand, Slab, Store

IMAGINED = "imagined"  # what nobody moved comes from there


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
    warm: Mapping[int, Numbers] = field(default_factory=dict)  # votes [E] of earlier runs, by layer
    expert_bytes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where votes are
    ledger: Ledger = field(init=False)
    books: dict[int, Slots] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.expert_bytes, lambda layer: self._book(layer, Lru()))

    def serve(self, layer: int, demand: Demand) -> Iterator[Slab]:
        mask = demand.used.cpu().numpy()
        book = self._layer(layer)
        used, hits = np.count_nonzero(mask), np.count_nonzero(mask & book.resident)
        self.ledger.served(layer, demand, used=int(used), hits=int(hits))
        waves = book.serve(mask, asked_votes(self.rule, demand))
        self.ledger.moved(IMAGINED, sum(len(wave.loads) for wave in waves))
        yield from self.store.serve(layer, demand)

    @property
    def used(self) -> int:
        """Experts asked for so far."""
        return self.ledger.traffic().used

    @property
    def moved(self) -> int:
        """Experts that would have come so far."""
        return self.ledger.traffic().moved

    def empty(self) -> None:
        """Forget who is here; those of the start come back."""
        self.ledger.emptied()
        layers = tuple(self.books)
        self.books.clear()
        for layer in layers:
            self._layer(layer)

    def resident(self, layer: int) -> Tensor | None:
        return torch.from_numpy(self._layer(layer).resident).to(self.device)

    def slots(self, layer: int) -> int | None:
        del layer
        return self.capacity

    def _layer(self, layer: int) -> Slots:
        if layer not in self.books:
            self.books[layer] = book = self._book(layer, self.rule)
            self.ledger.moved(IMAGINED, int(book.resident.sum()))
        return self.books[layer]

    def _book(self, layer: int, rule: Eviction) -> Slots:
        return Slots(self.experts, self.capacity, rule, self.warm.get(layer))
