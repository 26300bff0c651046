"""The ledger of a store: what every forward used, found there, moved and waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from coterie.experts.slots import Slots
from coterie.experts.traffic import Moved, Traffic
from coterie.values import Demand, membership

LINES = 4096  # forwards that are kept one by one; of those before, only the sum
PENDING = 1 << 22  # ids of tokens' own experts that wait to be settled
WRITING = ("prefill", "commit")  # kinds of forward that only write keys

Waiting = Callable[[], float]
"""Seconds so far in which nothing was computed because somebody was on the way."""

Book = Callable[[int], Slots]
"""Of a layer: slots as many as the store's and begun like them, under LRU."""


class Reporting(Protocol):
    """A store that keeps only some experts at hand, and a ledger of it."""

    @property
    def ledger(self) -> Ledger: ...

    @property
    def capacity(self) -> int:
        """Slots of a layer."""
        ...

    def empty(self) -> None:
        """Be as at the start, before any forward: nobody at hand, or who is from the first."""
        ...


@dataclass(frozen=True)
class Line:
    """One forward. ``blocks`` are where its ``rows`` stood; their ``traffic`` is one."""

    number: int
    kind: str  # as plans call it, "" where nobody said
    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    traffic: Traffic


@dataclass  # not frozen: it grows until its forward is over
class Tally:
    """A forward, or the sum of many, while it is counted."""

    number: int = 0
    kind: str = ""
    rows: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    forwards: int = 0
    used: int = 0
    hits: int = 0
    aside: int = 0
    vanilla: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    began: float | None = None
    layer: int = -1  # the last one served
    sources: dict[str, Moved] = field(default_factory=dict)

    @property
    def counts(self) -> int:
        """As how many forwards that denoise it counts, once it is over."""
        return int(self.layer >= 0 and self.kind not in WRITING)

    def take(self, other: Tally) -> None:
        """Add all of another that is no name; who would have come under vanilla comes later."""
        self.forwards += other.forwards
        self.used += other.used
        self.hits += other.hits
        self.aside += other.aside
        self.waited += other.waited
        self.seconds += other.seconds
        for tier, moved in other.sources.items():
            self.sources[tier] = self.sources.get(tier, Moved()).joined(moved)


@dataclass  # not frozen: it is written
class Ledger:
    """What a store did, forward by forward, ``LINES`` of them; totals are of all.

    A store tells of each layer that it serves, who asks for a forward when one begins and ends.
    Where nobody does, a layer that is not above the last begins the next. What fills the memory
    before a forward is in the totals, and in no forward. Everything is told in the thread that
    serves. What vanilla would have moved is worked out when somebody reads: until
    then a forward leaves its tokens' own choices behind, and no time is spent.
    """

    expert_bytes: int
    book: Book
    waiting: Waiting = lambda: 0.0
    _open: Tally = field(default_factory=Tally)
    _closed: deque[Tally] = field(default_factory=lambda: deque(maxlen=LINES))
    _before: Tally = field(default_factory=Tally)  # the sum of all that are closed
    _compared: bool = False
    _pending: list[tuple[Tally, int, torch.Tensor, int] | None] = field(default_factory=list)
    _waiting: int = 0
    _shadow: dict[int, Slots] = field(default_factory=dict)

    def compare(self) -> None:
        """From now on, keep what vanilla needs; raises RuntimeError where it is too late."""
        if self._before.used or self._open.used:
            raise RuntimeError("vanilla's memory would begin empty where the store's is not")
        self._compared = True

    def began(self, kind: str, rows: tuple[int, ...] = (), blocks: tuple[int, ...] = ()) -> None:
        """A forward starts."""
        self._close()
        self._open = Tally(self._open.number, kind, rows, blocks, began=time.perf_counter())

    def ended(self) -> None:
        """It is over, and took until now."""
        if self._open.began is not None:
            self._open.seconds = time.perf_counter() - self._open.began
        self._close()

    def served(self, layer: int, demand: Demand, *, used: int, hits: int, aside: int = 0) -> None:
        """A layer is asked for so many experts, of whom ``hits`` are there, and ``aside`` are
        computed where they lie."""
        line = self._open
        if layer <= line.layer:
            self._close()
            line = self._open
        line.layer = layer
        line.used += used
        line.hits += hits
        line.aside += aside
        if self._compared and demand.routing is not None:
            own = demand.routing.own
            self._pending.append((line, layer, own, len(demand.used)))
            self._waiting += own.numel()
            if self._waiting > PENDING:
                self._settle()

    def moved(self, tier: str, experts: int = 1, size: int | None = None) -> None:
        """So many came from there, ``size`` bytes in all where they are not moved whole."""
        weight = experts * self.expert_bytes if size is None else size
        if not experts:
            return
        sources = self._open.sources
        sources[tier] = sources.get(tier, Moved()).joined(Moved(experts, weight))

    def emptied(self) -> None:
        """The memory is as it was before any forward, and so is vanilla's; sums stay."""
        self._close()
        if self._compared:
            self._pending.append(None)

    @property
    def lines(self) -> tuple[Line, ...]:
        """Of each forward that is over, or of the last ``LINES``."""
        self._settle()
        return tuple(
            Line(one.number, one.kind, one.rows, one.blocks, self._read(one))
            for one in self._closed
        )

    def traffic(self) -> Traffic:
        """Of all forwards, one that is not over among them."""
        self._settle()
        whole = Tally(vanilla=self._before.vanilla)
        whole.take(self._before)
        whole.take(self._open)
        whole.waited = self.waiting()
        whole.forwards += self._open.counts
        return self._read(whole)

    def _close(self) -> None:
        line = self._open
        if line.layer < 0 and not line.sources:
            return
        line.forwards, line.waited = line.counts, self.waiting() - self._before.waited
        self._before.take(line)
        if line.layer >= 0:
            self._closed.append(line)
        # A store that nobody tells of forwards counts them itself; their kind stays unknown.
        self._open = Tally(line.number + (line.layer >= 0), line.kind, line.rows, line.blocks)

    def _settle(self) -> None:
        """Let vanilla's memory go through what has waited."""
        for entry in self._pending:
            if entry is None:
                self._shadow.clear()
                continue
            line, layer, own, experts = entry
            if layer not in self._shadow:
                self._shadow[layer] = self.book(layer)
            used = membership(own.flatten(), experts).cpu().numpy()
            loads = sum(len(wave.loads) for wave in self._shadow[layer].serve(used))
            line.vanilla += loads
            self._before.vanilla += loads
        self._pending.clear()
        self._waiting = 0

    def _read(self, tally: Tally) -> Traffic:
        return Traffic(
            tally.forwards,
            self.expert_bytes,
            tally.used,
            tally.hits,
            dict(tally.sources),
            tally.vanilla if self._compared else None,
            tally.waited,
            tally.seconds,
            tally.aside,
        )
