"""The store that keeps some experts of each layer and fetches the others, wave by wave."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coterie.experts.eviction import Eviction, Lru
from coterie.experts.slots import NOBODY, Places, Slots
from coterie.experts.tiers import Tier
from coterie.experts.traffic import Traffic
from coterie.values import Demand, Slab

READERS = 4  # fetches in flight

Shown = Callable[[Tensor, Tensor], Slab]
"""A slab over slots [n, bytes of an expert] uint8 and ``slot_of`` [E]."""

Allocate = Callable[[int, int], Tensor]
"""Memory for (slots, bytes of an expert), uint8."""


@dataclass(frozen=True)
class Shelf:
    """A layer's slots: the book of them, and their bytes."""

    slots: Slots
    memory: Tensor  # [capacity, bytes of an expert] uint8
    whole: list[Slab] = field(default_factory=list)  # of everybody here, once it was asked for

    def everybody(self, shown: Shown) -> Slab:
        """Of all that are here, made once for as long as nobody comes."""
        if not self.whole:
            self.whole.append(shown(self.memory, torch.from_numpy(self.slots.slot_of.copy())))
        return self.whole[0]

    def slab(self, shown: Shown, where: Places, experts: Sequence[int]) -> Slab:
        """Of these experts alone."""
        slot_of = np.full(self.slots.experts, NOBODY, dtype=np.int64)
        chosen = list(experts)
        slot_of[chosen] = where[chosen]
        return shown(self.memory, torch.from_numpy(slot_of))


@dataclass  # not frozen: it holds what changes with every forward
class Offloaded:
    """``capacity`` slots for the experts of each layer, over a tier that holds them all.

    Experts that are here are computed while the others come; a coreset larger than the slots comes
    in waves. Nothing that a slab was made of is overwritten before the next slab is asked for.
    ``serve`` reads on the host who is used, and waits for fetches. Where one fails, the layer
    forgets all that it held, and the error says which expert it was.
    """

    tier: Tier
    shown: Shown
    allocate: Allocate
    experts: int
    expert_bytes: int
    capacity: int
    rule: Eviction = field(default_factory=Lru)
    forwards: int = 0  # of a layer
    used: int = 0
    moved: int = 0
    waited: float = 0.0  # seconds in which nothing was computed
    _shelves: dict[int, Shelf] = field(default_factory=dict)
    _readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(READERS, "coterie-experts")
    )

    def serve(self, layer: int, demand: Demand) -> Iterator[Slab]:
        shelf = self._shelf(layer)
        mask = demand.used.cpu().numpy()
        self.forwards, self.used = self.forwards + 1, self.used + int(np.count_nonzero(mask))
        if shelf.slots.holds_all(mask):
            shelf.slots.note(mask)
            yield shelf.everybody(self.shown)
            return
        where = shelf.slots.slot_of.copy()
        shelf.whole.clear()
        waves = shelf.slots.serve(mask)
        fetching: dict[int, Future[None]] = {}
        try:
            for place, wave in enumerate(waves):
                self._fetch(layer, shelf, wave.loads, fetching)
                self._wait(fetching)
                where = _moved_in(where, wave.loads)
                if coming := waves[place + 1].loads if place + 1 < len(waves) else ():
                    reads = set(where[list(wave.experts)].tolist())
                    free = [(expert, slot) for expert, slot in coming if slot not in reads]
                    self._fetch(layer, shelf, free, fetching)
                yield shelf.slab(self.shown, where, wave.experts)
        except BaseException:
            wait(fetching.values())
            self._shelves.pop(layer, None)
            raise

    def resident(self, layer: int) -> Tensor | None:
        return torch.from_numpy(self._shelf(layer).slots.resident)

    def slots(self, layer: int) -> int | None:
        del layer
        return self.capacity

    def traffic(self, layers: int) -> Traffic:
        """So far, of a model with so many layers that have experts."""
        return Traffic(self.forwards // layers, self.expert_bytes, self.used, self.moved)

    def _shelf(self, layer: int) -> Shelf:
        if layer not in self._shelves:
            slots = Slots(self.experts, self.capacity, self.rule)
            memory = self.allocate(slots.capacity, self.expert_bytes)
            self._shelves[layer] = Shelf(slots, memory)
        return self._shelves[layer]

    def _fetch(
        self,
        layer: int,
        shelf: Shelf,
        loads: Sequence[tuple[int, int]],
        fetching: dict[int, Future[None]],
    ) -> None:
        """Begin those of these loads that have not begun."""
        for expert, slot in loads:
            if expert not in fetching:
                self.moved += 1
                into = shelf.memory[slot]
                fetching[expert] = self._readers.submit(self.tier.fetch, layer, expert, into)

    def _wait(self, fetching: Mapping[int, Future[None]]) -> None:
        """Until all that has begun is there; raises what a fetch raised."""
        if not fetching:
            return
        began = time.perf_counter()
        for one in fetching.values():
            one.result()
        self.waited += time.perf_counter() - began


def _moved_in(where: Places, loads: Sequence[tuple[int, int]]) -> Places:
    """Who lies in which slot once these loads are done."""
    where = where.copy()
    for expert, slot in loads:
        where[where == slot] = NOBODY
        where[expert] = slot
    return where
