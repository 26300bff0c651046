"""The store that keeps some experts of each layer and fetches the others, wave by wave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from coterie.experts.aside import Aside, Counts
from coterie.experts.couriers import Courier
from coterie.experts.eviction import Eviction, Lru, Mask, Numbers, asked_votes
from coterie.experts.ledger import Ledger
from coterie.experts.slots import NOBODY, Places, Slots, Wave
from coterie.naming import CoterieError
from coterie.values import Demand, Slab

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
    here: list[Tensor] = field(default_factory=list)  # [E] bool, who that is, once asked for

    def changes(self) -> None:
        """Others will be here."""
        self.whole.clear()
        self.here.clear()


@dataclass  # not frozen: it holds what changes with every forward
class Offloaded:
    """``capacity`` slots for the experts of each layer, and a courier to where they all are.

    Experts that are here are computed while the others come; a coreset larger than the slots comes
    in waves. Nothing that a slab was made of is overwritten before it was computed with, which is
    asked for by the time the next slab is. ``serve`` reads on the host who is used: on a GPU, the
    one time that it waits for computing. Where bringing fails, the layer forgets all that it held,
    and the error says which expert it was. A layer's slots are made, and filled with the best of
    ``warm``, when it is first asked what it holds.
    """

    courier: Courier
    shown: Shown
    allocate: Allocate
    experts: int
    expert_bytes: int
    capacity: int
    rule: Eviction = field(default_factory=Lru)
    warm: Mapping[int, Numbers] = field(default_factory=dict)  # votes [E] of earlier runs, by layer
    aside: Aside | None = None  # experts that do not come, for they are computed where they lie
    ledger: Ledger = field(init=False)
    _shelves: dict[int, Shelf] = field(default_factory=dict)
    _memory: dict[int, Tensor] = field(default_factory=dict)  # outlives what a layer forgets
    _forgot: set[int] = field(default_factory=set)  # layers for which bringing failed

    def __post_init__(self) -> None:
        self.ledger = Ledger(
            self.expert_bytes,
            lambda layer: Slots(self.experts, self.capacity, Lru(), self.warm.get(layer)),
            lambda: self.courier.waited,
        )

    def serve(self, layer: int, demand: Demand) -> Iterator[Slab]:
        shelf = self._shelf(layer)
        mask, tokens = self._asked(demand)
        # Where nobody ever leaves, no rule has a say.
        votes = asked_votes(self.rule, demand) if self.capacity < self.experts else None
        if shelf.slots.holds_all(mask):
            used = int(np.count_nonzero(mask))
            self.ledger.served(layer, demand, used=used, hits=used)
            if self.capacity < self.experts:
                shelf.slots.note(mask, votes)
            yield from self._lent(self._everybody(shelf))
            return
        missed = mask & ~shelf.slots.resident
        left = self._left_aside(missed, tokens)
        used, hits, aside = (int(np.count_nonzero(one)) for one in (mask, mask & ~missed, left))
        self.ledger.served(layer, demand, used=used, hits=hits, aside=aside)
        where = shelf.slots.slot_of.copy()
        shelf.changes()
        coming: dict[int, Future[str]] = {}
        try:  # from before the book tells of experts that have yet to come
            waves = shelf.slots.serve(mask & ~left, votes)
            if aside:  # first: what it computes with is there; copies are asked for before it is
                waves.insert(0, Wave(tuple(np.flatnonzero(left).tolist())))
            yield from self._in_waves(layer, shelf, waves, where, coming, aside=aside > 0)
        except BaseException as error:
            self._forget(layer, coming, error)
            raise

    def _in_waves(
        self,
        layer: int,
        shelf: Shelf,
        waves: Sequence[Wave],
        where: Places,
        coming: dict[int, Future[str]],
        *,
        aside: bool,
    ) -> Iterator[Slab]:
        """A slab for each; the first one's lies outside the slots where it is computed aside."""
        for place, wave in enumerate(waves):
            self._bring(layer, shelf, wave.loads, coming)
            if wave.loads:
                self._join(coming)
            where = _moved_in(where, wave.loads)
            self._bring(layer, shelf, _early(waves[place:], where), coming)
            if aside and self.aside and not place:
                yield self.aside.slab(layer, wave.experts)
            else:
                yield from self._lent(self._slab(shelf, where, wave.experts))

    def _asked(self, demand: Demand) -> tuple[Mask, Counts | None]:
        """Who is used, and for how many tokens where that matters: one read of the device."""
        tokens = None if self.aside is None else demand.tokens
        if tokens is None:
            return demand.used.cpu().numpy(), None
        both = torch.stack([demand.used.to(tokens.dtype), tokens]).cpu().numpy()
        return both[0] > 0, both[1]

    def _left_aside(self, missed: Mask, tokens: Counts | None) -> Mask:
        """[E]: who is computed where it lies."""
        if self.aside is None or tokens is None:
            return np.zeros_like(missed)
        return self.aside.choice.chosen(missed, tokens)

    @property
    def used(self) -> int:
        """Experts asked for so far."""
        return self.ledger.traffic().used

    @property
    def moved(self) -> int:
        """Experts that came so far."""
        return self.ledger.traffic().moved

    @property
    def waited(self) -> float:
        """Seconds in which nothing was computed."""
        return self.courier.waited

    def resident(self, layer: int) -> Tensor | None:
        shelf = self._shelf(layer)
        if not shelf.here:
            shelf.here.append(self.courier.there(shelf.slots.resident))
        return shelf.here[0]

    def slots(self, layer: int) -> int | None:
        del layer
        return self.capacity

    def empty(self) -> None:
        """Forget who is here; the memory itself is kept, and those of the start come back."""
        self.ledger.emptied()
        layers = tuple(self._shelves)
        self._shelves.clear()
        self._forgot.clear()
        for layer in layers:
            self._shelf(layer)

    def _shelf(self, layer: int) -> Shelf:
        if layer not in self._shelves:
            # Only the first time: an expert that cannot be read and that nobody needs is no reason
            # to fail again.
            warm = None if layer in self._forgot else self.warm.get(layer)
            slots = Slots(self.experts, self.capacity, self.rule, warm)
            if layer not in self._memory:
                self._memory[layer] = allocated(self.allocate, slots.capacity, self.expert_bytes)
                self.courier.computed()  # with what lay there before
            shelf = Shelf(slots, self._memory[layer])
            self._fill(layer, shelf)
            self._shelves[layer] = shelf
        return self._shelves[layer]

    def _fill(self, layer: int, shelf: Shelf) -> None:
        """Those that are to be there from the start."""
        there = [(expert, at) for at, expert in enumerate(shelf.slots.holds) if expert != NOBODY]
        coming: dict[int, Future[str]] = {}
        try:
            self._bring(layer, shelf, there, coming)
            self._join(coming)
        except BaseException as error:
            self._forget(layer, coming, error)
            raise

    def _forget(self, layer: int, coming: Mapping[int, Future[str]], error: BaseException) -> None:
        """Nobody is here any more, once nothing is on its way."""
        # Whoever interrupts this wait leaves no slots into which something still comes.
        memory = self._memory.pop(layer)
        self._shelves.pop(layer, None)
        self._forgot.add(layer)
        self.courier.settle(coming.values())
        # Ctrl-C between asking for an expert and noting it leaves one on its way unknown to all.
        if not isinstance(error, KeyboardInterrupt):
            self._memory[layer] = memory

    def _bring(
        self,
        layer: int,
        shelf: Shelf,
        loads: Sequence[tuple[int, int]],
        coming: dict[int, Future[str]],
    ) -> None:
        """Begin those of these loads that have not begun."""
        for expert, slot in loads:
            if expert not in coming:
                coming[expert] = self.courier.bring(layer, expert, shelf.memory[slot])

    def _join(self, coming: dict[int, Future[str]]) -> None:
        """Those that were begun are there, or this raises; nobody is on the way then."""
        if not coming:
            return
        self.courier.join(coming.values())
        # All are done, as the courier has promised; counting them shall not wait in its stead.
        for one in coming.values():
            if one.done():
                self.ledger.moved(one.result())
        coming.clear()

    def _lent(self, slab: Slab) -> Iterator[Slab]:
        """Nothing that comes later overwrites what was asked to be computed with it."""
        try:
            yield slab
        finally:
            self.courier.computed()

    def _everybody(self, shelf: Shelf) -> Slab:
        """Of all that are here, made once for as long as nobody comes."""
        if not shelf.whole:
            shelf.whole.append(self.shown(shelf.memory, self.courier.there(shelf.slots.slot_of)))
        return shelf.whole[0]

    def _slab(self, shelf: Shelf, where: Places, experts: Sequence[int]) -> Slab:
        """Of these experts alone."""
        slot_of = np.full(self.experts, NOBODY, dtype=np.int64)
        chosen = list(experts)
        slot_of[chosen] = where[chosen]
        return self.shown(shelf.memory, self.courier.there(slot_of))


def allocated(allocate: Allocate, slots: int, size: int) -> Tensor:
    """That memory; raises CoterieError where the system has none."""
    try:
        # Threads write into it, and none of them is in the mode that a forward may be in.
        with torch.inference_mode(False):
            return allocate(slots, size)
    except (OSError, MemoryError, RuntimeError) as error:
        raise CoterieError(
            f"no memory for {slots} experts of {size:,} bytes ({str(error).splitlines()[0]}); "
            "give --expert-memory less"
        ) from None


def _early(waves: Sequence[Wave], where: Places) -> list[tuple[int, int]]:
    """Of the loads that come next, those into slots that no wave before them reads."""
    reads: set[int] = set()
    for before, wave in pairwise(waves):
        reads |= set(where[list(before.experts)].tolist())
        if wave.loads:
            return [(expert, slot) for expert, slot in wave.loads if slot not in reads]
    return []


def _moved_in(where: Places, loads: Sequence[tuple[int, int]]) -> Places:
    """Who lies in which slot once these loads are done."""
    where = where.copy()
    for expert, slot in loads:
        where[where == slot] = NOBODY
        where[expert] = slot
    return where
