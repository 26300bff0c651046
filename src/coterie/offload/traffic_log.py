"""The ledger of a store: what every forward used, found there, moved and waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from coterie.offload.slot_table import Slots
from coterie.offload.traffic import Traffic, Transfer
from coterie.values import ExpertRequest, expert_mask

LOGGED_FORWARDS = 4096  # forwards that are kept one by one; of those before, only the sum
MAX_PENDING_IDS = 1 << 22  # ids of tokens' own experts that wait to be settled
KV_ONLY_KINDS = ("prefill", "commit")  # kinds of forward that only write keys

StallClock = Callable[[], float]
"""Seconds so far in which nothing was computed because somebody was on the way."""

SlotsFactory = Callable[[int], Slots]
"""Of a layer: slots as many as the store's and begun like them, under LRU."""


class CachedStore(Protocol):
    """A store that keeps only some experts at hand, and a ledger of it."""

    @property
    def traffic_log(self) -> TrafficLog: ...

    @property
    def capacity(self) -> int:
        """Slots of a layer."""
        ...

    def reset(self) -> None:
        """Be as at the start, before any forward: nobody at hand, or who is from the first."""
        ...


@dataclass(frozen=True)
class ForwardTraffic:
    """One forward. ``blocks`` are where its ``rows`` stood; their ``traffic`` is one."""

    number: int
    kind: str  # as plans call it, "" where nobody said
    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    traffic: Traffic


@dataclass  # not frozen: it grows until its forward is over
class ForwardCounters:
    """A forward, or the sum of many, while it is counted."""

    number: int = 0
    kind: str = ""
    rows: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    forwards: int = 0
    used: int = 0
    hits: int = 0
    on_cpu: int = 0
    vanilla_misses: int = 0
    stall_seconds: float = 0.0
    seconds: float = 0.0
    start_time: float | None = None
    last_layer: int = -1  # the last one served
    transfers: dict[str, Transfer] = field(default_factory=dict)

    @property
    def denoising_forwards(self) -> int:
        """As how many forwards that denoise it counts, once it is over."""
        return int(self.last_layer >= 0 and self.kind not in KV_ONLY_KINDS)

    def add(self, other: ForwardCounters) -> None:
        """Add all of another that is no name; who would have come under vanilla comes later."""
        self.forwards += other.forwards
        self.used += other.used
        self.hits += other.hits
        self.on_cpu += other.on_cpu
        self.stall_seconds += other.stall_seconds
        self.seconds += other.seconds
        for tier, transfer in other.transfers.items():
            self.transfers[tier] = self.transfers.get(tier, Transfer()).plus(transfer)


@dataclass  # not frozen: it is written
class TrafficLog:
    """What a store did, forward by forward, ``LINES`` of them; totals are of all.

    A store tells of each layer that it serves, who asks for a forward when one begins and ends.
    Where nobody does, a layer that is not above the last begins the next. What fills the memory
    before a forward is in the totals, and in no forward. Everything is told in the thread that
    serves. What vanilla would have moved is worked out when somebody reads: until
    then a forward leaves its tokens' own choices behind, and no time is spent.
    """

    expert_bytes: int
    vanilla_slots: SlotsFactory
    stall_clock: StallClock = lambda: 0.0
    _current: ForwardCounters = field(default_factory=ForwardCounters)
    _finished: deque[ForwardCounters] = field(default_factory=lambda: deque(maxlen=LOGGED_FORWARDS))
    _totals: ForwardCounters = field(
        default_factory=ForwardCounters
    )  # the sum of all that are closed
    _tracks_vanilla: bool = False
    _pending: list[tuple[ForwardCounters, int, torch.Tensor, int] | None] = field(
        default_factory=list
    )
    _pending_ids: int = 0
    _vanilla_caches: dict[int, Slots] = field(default_factory=dict)

    def track_vanilla(self) -> None:
        """From now on, keep what vanilla needs; raises RuntimeError where it is too late."""
        if self._totals.used or self._current.used:
            raise RuntimeError("vanilla's memory would begin empty where the store's is not")
        self._tracks_vanilla = True

    def begin_forward(
        self, kind: str, rows: tuple[int, ...] = (), blocks: tuple[int, ...] = ()
    ) -> None:
        """A forward starts."""
        self._finish_forward()
        self._current = ForwardCounters(
            self._current.number, kind, rows, blocks, start_time=time.perf_counter()
        )

    def end_forward(self) -> None:
        """It is over, and took until now."""
        if self._current.start_time is not None:
            self._current.seconds = time.perf_counter() - self._current.start_time
        self._finish_forward()

    def log_layer(
        self, layer: int, request: ExpertRequest, *, used: int, hits: int, on_cpu: int = 0
    ) -> None:
        """A layer is asked for so many experts, of whom ``hits`` are there, and ``aside`` are
        computed where they lie."""
        counters = self._current
        if layer <= counters.last_layer:
            self._finish_forward()
            counters = self._current
        counters.last_layer = layer
        counters.used += used
        counters.hits += hits
        counters.on_cpu += on_cpu
        if self._tracks_vanilla and request.routing is not None:
            vanilla_ids = request.routing.vanilla_ids
            self._pending.append((counters, layer, vanilla_ids, len(request.used)))
            self._pending_ids += vanilla_ids.numel()
            if self._pending_ids > MAX_PENDING_IDS:
                self._replay_vanilla()

    def log_transfer(self, tier: str, experts: int = 1, total_bytes: int | None = None) -> None:
        """So many came from there, ``size`` bytes in all where they are not moved whole."""
        num_bytes = experts * self.expert_bytes if total_bytes is None else total_bytes
        if not experts:
            return
        transfers = self._current.transfers
        transfers[tier] = transfers.get(tier, Transfer()).plus(Transfer(experts, num_bytes))

    def log_reset(self) -> None:
        """The memory is as it was before any forward, and so is vanilla's; sums stay."""
        self._finish_forward()
        if self._tracks_vanilla:
            self._pending.append(None)

    @property
    def forwards(self) -> tuple[ForwardTraffic, ...]:
        """Of each forward that is over, or of the last ``LINES``."""
        self._replay_vanilla()
        return tuple(
            ForwardTraffic(
                counters.number,
                counters.kind,
                counters.rows,
                counters.blocks,
                self._to_traffic(counters),
            )
            for counters in self._finished
        )

    def traffic(self) -> Traffic:
        """Of all forwards, one that is not over among them."""
        self._replay_vanilla()
        total = ForwardCounters(vanilla_misses=self._totals.vanilla_misses)
        total.add(self._totals)
        total.add(self._current)
        total.stall_seconds = self.stall_clock()
        total.forwards += self._current.denoising_forwards
        return self._to_traffic(total)

    def _finish_forward(self) -> None:
        counters = self._current
        if counters.last_layer < 0 and not counters.transfers:
            return
        counters.forwards, counters.stall_seconds = (
            counters.denoising_forwards,
            self.stall_clock() - self._totals.stall_seconds,
        )
        self._totals.add(counters)
        if counters.last_layer >= 0:
            self._finished.append(counters)
        # A store that nobody tells of forwards counts them itself; their kind stays unknown.
        self._current = ForwardCounters(
            counters.number + (counters.last_layer >= 0),
            counters.kind,
            counters.rows,
            counters.blocks,
        )

    def _replay_vanilla(self) -> None:
        """Let vanilla's memory go through what has waited."""
        for entry in self._pending:
            if entry is None:
                self._vanilla_caches.clear()
                continue
            counters, layer, vanilla_ids, experts = entry
            if layer not in self._vanilla_caches:
                self._vanilla_caches[layer] = self.vanilla_slots(layer)
            used = expert_mask(vanilla_ids.flatten(), experts).cpu().numpy()
            loads = sum(len(wave.loads) for wave in self._vanilla_caches[layer].serve(used))
            counters.vanilla_misses += loads
            self._totals.vanilla_misses += loads
        self._pending.clear()
        self._pending_ids = 0

    def _to_traffic(self, counters: ForwardCounters) -> Traffic:
        return Traffic(
            counters.forwards,
            self.expert_bytes,
            counters.used,
            counters.hits,
            dict(counters.transfers),
            counters.vanilla_misses if self._tracks_vanilla else None,
            counters.stall_seconds,
            counters.seconds,
            counters.on_cpu,
        )
