"""The store with two precisions: finer experts where they are, coarse ones where they are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from coterie.experts.couriers import Courier
from coterie.experts.eviction import ByVotes, Eviction, Lru, Mask, Numbers
from coterie.experts.ledger import Ledger
from coterie.experts.offload import Allocate, Offloaded, Shown, allocated
from coterie.experts.slots import NOBODY, Slots
from coterie.experts.traffic import Moved
from coterie.experts.upgrades import Finer
from coterie.values import Demand, Slab

TINY = 1e-12  # of a share: what adding in another order may change


@dataclass(frozen=True)
class Errors:
    """Relative errors of a layer's experts, [E] each: of what they give for Gaussian input."""

    fine: Numbers
    coarse: Numbers


@dataclass  # not frozen: it keeps book
class Precision:
    """In which precision votes were served; sums over layers and forwards.

    The loss bound of a forward's layer is the sum over used experts of vote share x relative error
    of the precision in which the expert was served: what errors come to that all point one way. The
    squares of errors in place of errors tell what they come to where each points its own way. Both
    stay 0 without ``errors``.
    """

    forwards: int = 0  # of a layer
    fine: float = 0.0  # vote shares
    bound: float = 0.0
    squares: float = 0.0
    upgrades: int = 0

    @property
    def votes_fine(self) -> float:
        """Share of the votes that was served fine; of a layer and forward, on average."""
        return self.fine / max(1, self.forwards)

    @property
    def loss_bound(self) -> float:
        """Of a layer and forward, on average."""
        return self.bound / max(1, self.forwards)

    @property
    def loss_rms(self) -> float:
        """The root of the mean square: near the relative error of a layer's output."""
        return math.sqrt(self.squares / max(1, self.forwards))

    def note(self, votes: Numbers, finely: Mask, coarsely: Mask, errors: Errors | None) -> None:
        """One forward of a layer; who is in neither mask was not used."""
        share = shares(votes, finely | coarsely)
        self.forwards += 1
        self.fine += float(share[finely].sum())
        if errors is not None:
            error = np.where(finely, errors.fine, errors.coarse)
            self.bound += float((share * error).sum())
            self.squares += float((share * error**2).sum())


def shares(votes: Numbers, used: Mask) -> Numbers:
    """Of the votes [E] for those used, the part of each; equal parts where they have none."""
    counted = np.where(used, votes, 0.0)
    whole = counted.sum()
    return counted / whole if whole > 0 else used / max(1, int(np.count_nonzero(used)))


@dataclass(frozen=True)
class Source:
    """Where finer experts come from and how they are shown: slots for ``capacity`` of each
    layer."""

    courier: Courier
    shown: Shown
    allocate: Allocate
    expert_bytes: int
    capacity: int


@dataclass(frozen=True)
class Shelf:
    """A layer's finer experts: the book, their bytes, and who is on the way."""

    book: Finer
    memory: Tensor  # [capacity, bytes of an expert] uint8
    coming: list[Future[str]] = field(default_factory=list)


@dataclass  # not frozen: it holds what changes with every forward
class Mixed:
    """Slots with experts in a finer precision beside a store that has all of them coarse.

    The most voted experts that together hold ``mass`` of a forward's votes become fine before they
    serve it, where others that are fine are worth less. Of the coarse that served, ``upgrades`` at
    most become fine afterwards: from the next forward of their layer on, which waits for them. So
    what is computed follows from what was asked for before, and from nothing that a clock decides.
    With neither, who is fine never changes.
    """

    fine: Source
    coarse: Offloaded
    upgrades: int = 0  # begun after a forward of a layer, at most
    mass: float = 0.0  # share of a forward's votes whose experts are fine at once
    rule: Eviction = field(default_factory=ByVotes)
    warm: Mapping[int, Numbers] = field(default_factory=dict)  # by layer, votes of earlier runs
    errors: Mapping[int, Errors] = field(default_factory=dict)  # by layer, where they are known
    kinds: tuple[str, str] = ("fine", "coarse")  # what both are called
    precision: Precision = field(default_factory=Precision)
    ledger: Ledger = field(init=False)  # of both; "vanilla" is one of fine experts in all memory
    _shelves: dict[int, Shelf] = field(default_factory=dict)
    _memory: dict[int, Tensor] = field(default_factory=dict)  # outlives what a layer forgets
    _forgot: set[int] = field(default_factory=set)  # layers for which bringing failed
    _noted: dict[str, Moved] = field(default_factory=dict)  # what came of the coarse, by its tier

    def __post_init__(self) -> None:
        fine, coarse = self.fine, self.coarse
        room = fine.capacity * fine.expert_bytes + coarse.capacity * coarse.expert_bytes
        like = room // fine.expert_bytes
        self.ledger = Ledger(
            fine.expert_bytes,
            lambda layer: Slots(coarse.experts, like, Lru(), self.warm.get(layer)),
            lambda: self.waited,
        )

    def serve(self, layer: int, demand: Demand) -> Iterator[Slab]:
        shelf = self._arrived(layer)
        used, votes, before = demand.used.cpu().numpy(), voted(demand), shelf.book.resident
        shelf.book.note(used, votes)
        self._upgrade(layer, shelf, leading(votes, used, self.mass) & ~before, len(used))
        finely = used & shelf.book.resident
        coarsely = used & ~finely
        self._note(layer, demand, before=before, finely=finely, coarsely=coarsely)
        self.precision.note(votes, finely, coarsely, self.errors.get(layer))
        fine = self._lent(layer) if finely.any() else iter(())
        if coarsely.any():
            yield from self._both(layer, demand, coarsely, fine)
        yield from fine
        self._note_coarse()
        self._upgrade(layer, shelf, coarsely, self.upgrades)

    def resident(self, layer: int) -> Tensor | None:
        """Those too that are here coarse only: nobody waits for them either."""
        coarse = self.coarse.resident(layer)
        fine = self.fine.courier.there(self._shelf(layer).book.resident)
        return None if coarse is None else coarse | fine

    def slots(self, layer: int) -> int | None:
        del layer
        return min(self.coarse.experts, self.capacity)

    @property
    def capacity(self) -> int:
        """Slots of both precisions; an expert may stand in both."""
        return self.fine.capacity + self.coarse.capacity

    def empty(self) -> None:
        """Forget who is here, once nobody is on the way; those of the start come back."""
        self.ledger.emptied()
        for shelf in self._shelves.values():
            self.fine.courier.settle(shelf.coming)
            self._count(shelf)
        layers = tuple(self._shelves)
        self._shelves.clear()
        self._forgot.clear()
        self.coarse.empty()
        self.fill(layers)

    def fill(self, layers: Sequence[int]) -> None:
        """Those of the start are there, in both precisions, before any forward counts them."""
        for layer in layers:
            self.coarse.resident(layer)
            self._shelf(layer)
        for layer in layers:
            self._arrived(layer)
        self._note_coarse()

    @property
    def waited(self) -> float:
        """Seconds in which nothing was computed, for whichever precision."""
        return self.fine.courier.waited + self.coarse.waited

    def _upgrade(self, layer: int, shelf: Shelf, missed: Mask, most: int) -> None:
        """Begin to bring these, as far as others are worth less."""
        with self._sure(layer, shelf):
            loads = shelf.book.upgrade(missed, most)
            self.precision.upgrades += len(loads)
            self._bring(layer, shelf, loads)

    def _note(
        self, layer: int, demand: Demand, *, before: Mask, finely: Mask, coarsely: Mask
    ) -> None:
        """In the ledger; nobody waits for who is here in the precision that serves."""
        coarse = self.coarse.resident(layer)
        assert coarse is not None
        hits = np.count_nonzero(finely & before | coarsely & coarse.cpu().numpy())
        used = np.count_nonzero(finely | coarsely)
        self.ledger.served(layer, demand, used=int(used), hits=int(hits))

    def _note_coarse(self) -> None:
        """Which coarse experts came since this was last asked."""
        for tier, moved in self.coarse.ledger.traffic().sources.items():
            new = moved.joined(self._noted.get(tier, Moved()), -1)
            self.ledger.moved(f"{tier}, {self.kinds[1]}", new.experts, new.bytes)
            self._noted[tier] = moved

    def _both(
        self, layer: int, demand: Demand, coarsely: Mask, fine: Iterator[Slab]
    ) -> Iterator[Slab]:
        """Coarse experts that are here go first where there are any: while they and the ``fine``
        ones are computed, the others come."""
        asked = self.fine.courier.there(coarsely)
        here = self.coarse.resident(layer)
        if here is None or not bool((here & asked).any()):
            yield from fine
        for slab in self.coarse.serve(layer, replace(demand, used=asked)):
            # A coarse slab may hold more than was asked for: who is fine shall not count twice.
            yield replace(slab, slot_of=slab.slot_of.where(asked, NOBODY))
            yield from fine

    def _lent(self, layer: int) -> Iterator[Slab]:
        """All that are fine, once they are there; nothing that comes later overwrites them before
        they were computed with."""
        courier, shelf = self.fine.courier, self._arrived(layer)
        try:
            yield self.fine.shown(shelf.memory, courier.there(shelf.book.slot_of))
        finally:
            courier.computed()

    def _arrived(self, layer: int) -> Shelf:
        """The layer's shelf, once all that was begun for it is there."""
        shelf = self._shelf(layer)
        with self._sure(layer, shelf):
            self.fine.courier.join(shelf.coming)
        self._count(shelf)
        return shelf

    def _count(self, shelf: Shelf) -> None:
        """Those that have come."""
        for one in shelf.coming:
            if one.done() and one.exception() is None:
                self.ledger.moved(f"{one.result()}, {self.kinds[0]}")
        shelf.coming.clear()

    @contextmanager
    def _sure(self, layer: int, shelf: Shelf) -> Iterator[None]:
        """Where this fails nobody is fine any more, once nothing is on its way: the book may tell
        of experts that never came."""
        try:
            yield
        except BaseException as error:
            # As in ``Offloaded``: no places are kept into which something may still come.
            memory = self._memory.pop(layer)
            self._shelves.pop(layer, None)
            self._forgot.add(layer)
            self.fine.courier.settle(shelf.coming)
            if not isinstance(error, KeyboardInterrupt):
                self._memory[layer] = memory
            raise

    def _shelf(self, layer: int) -> Shelf:
        if layer not in self._shelves:
            source = self.fine
            # Only the first time: who cannot be read and is not needed is no reason to fail again.
            warm = None if layer in self._forgot else self.warm.get(layer)
            book = Finer(self.coarse.experts, source.capacity, self.rule, warm)
            if layer not in self._memory:
                self._memory[layer] = allocated(source.allocate, book.capacity, source.expert_bytes)
                source.courier.computed()  # with what lay there before
            self._shelves[layer] = shelf = Shelf(book, self._memory[layer])
            known = enumerate(book.holds)
            with self._sure(layer, shelf):
                self._bring(layer, shelf, [(one, place) for place, one in known if one != NOBODY])
        return self._shelves[layer]

    def _bring(self, layer: int, shelf: Shelf, loads: Iterable[tuple[int, int]]) -> None:
        for expert, place in loads:
            shelf.coming.append(self.fine.courier.bring(layer, expert, shelf.memory[place]))


def leading(votes: Numbers, used: Mask, mass: float) -> Mask:
    """[E]: the fewest of those used that hold such a share of their votes, most voted first."""
    share = shares(votes, used)
    order = np.argsort(-share, kind="stable")
    before = np.cumsum(share[order]) - share[order]
    chosen = np.zeros_like(used)
    chosen[order[before < mass - TINY]] = True
    return chosen & used


def voted(demand: Demand) -> Numbers:
    """Votes [E] of a demand; one for each expert that is used where nobody said."""
    votes = demand.votes
    return (demand.used.double() if votes is None else votes).cpu().numpy()
