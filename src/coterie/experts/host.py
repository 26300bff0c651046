"""A tier in front of another: memory of the host for some experts, whatever their layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition

import numpy as np
from torch import Tensor

from coterie.experts.eviction import Eviction, Lfu, Numbers, Seen
from coterie.experts.tiers import HOST, Tier
from coterie.naming import CoterieError


@dataclass  # not frozen: its users come and go
class Place:
    """Where an expert lies. Nobody takes it away while it has users: who reads it in, or copies."""

    slot: int
    users: int = 1
    ready: bool = False


@dataclass  # not frozen: it holds what was fetched
class Host:
    """``memory`` for some experts of any layer, over a tier that holds them all.

    What is fetched is read into it, in place of who is worth least of those whom nobody copies at
    the moment; who is there already is copied. The rule is told of fetches, not of votes: by who is
    fetched most, for those fetched last are in the slots that asked for them
    (`results/prefetch-replayed.json`). From any thread, several at once: of those who want the same
    expert one reads it, the others wait. A read that fails leaves nothing behind, and every other
    expert where it is.
    """

    below: Tier
    memory: Tensor  # [n, bytes of an expert] uint8
    layers: Sequence[int]
    experts: int  # of a layer
    rule: Eviction = field(default_factory=Lfu)
    hits: int = 0
    misses: int = 0
    _places: dict[int, Place] = field(init=False, default_factory=dict)  # by number
    _free: list[int] = field(init=False)
    _worth: Numbers = field(init=False)
    _changed: Condition = field(init=False, default_factory=Condition)

    def __post_init__(self) -> None:
        if self.rule.asks_votes:
            raise CoterieError(
                "memory between tiers hears of fetches alone: lru and lfu go by them"
            )
        self._free = list(range(len(self.memory)))
        self._worth = self.rule.first(np.zeros(len(self.layers) * self.experts))

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        with self.lent(layer, expert) as (blob, found):
            into.copy_(blob)
        return found

    @contextmanager
    def lent(self, layer: int, expert: int) -> Iterator[tuple[Tensor, str]]:
        """An expert's bytes, read in if need be, which stay where they are until this is left; and
        the tier that they were found in.

        Who takes one more while holding as many as there are slots waits for ever.
        """
        number = self.layers.index(layer) * self.experts + expert
        place = self._taken(number)
        try:
            blob = self.memory[place.slot]
            found = HOST
            if not place.ready:
                found = self.below.fetch(layer, expert, blob)
                self._tell_ready(place)
            yield blob, found
        finally:
            self._give_back(number, place)

    def _taken(self, number: int) -> Place:
        """The place of an expert, ready or this caller's to fill."""
        with self._changed:
            self._note(number)
            while True:
                place = self._places.get(number)
                if place is None and (slot := self._room()) is not None:
                    self.misses += 1
                    place = self._places[number] = Place(slot)
                    return place
                if place is not None and place.ready:
                    self.hits += 1
                    place.users += 1
                    return place
                self._changed.wait()

    def _tell_ready(self, place: Place) -> None:
        with self._changed:
            place.ready = True
            self._changed.notify_all()

    def _give_back(self, number: int, place: Place) -> None:
        with self._changed:
            place.users -= 1
            if not place.ready:
                del self._places[number]
                self._free.append(place.slot)
            self._changed.notify_all()

    def _note(self, number: int) -> None:
        used = np.zeros(len(self._worth), dtype=bool)
        used[number] = True
        clock = self.hits + self.misses
        self._worth = self.rule.after(self._worth, Seen(clock, used, np.zeros(len(used))))

    def _room(self) -> int | None:
        """A slot that nobody needs; None while all are in use."""
        if self._free:
            return self._free.pop()
        idle = [number for number, place in self._places.items() if not place.users]
        if not idle:
            return None
        least = min(idle, key=lambda number: (self._worth[number], -number))
        return self._places.pop(least).slot


def host_slots(budget: int, *, layers: int, experts: int, size: int) -> int:
    """Experts that fit into so many bytes; raises CoterieError for less than one."""
    if budget < size:
        raise CoterieError(f"--host-memory: {budget:,} bytes are less than one expert's {size:,}")
    return min(layers * experts, budget // size)
