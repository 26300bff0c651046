"""The traffic log of an expert store: what each forward used, hit, fetched and waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from coterie.offload.slot_table import Slots
from coterie.offload.traffic import Traffic, Transfer
from coterie.values import ExpertRequest, expert_mask

LOGGED_FORWARDS = 4096  # forwards kept one by one; older ones only count in the totals
MAX_PENDING_IDS = 1 << 22  # vanilla expert ids that wait for their replay
KV_ONLY_KINDS = ("prefill", "commit")  # kinds of forward that only write keys and values

StallClock = Callable[[], float]
"""Seconds so far in which compute waited for fetches."""

SlotsFactory = Callable[[int], Slots]
"""Makes a layer's slots as the store's at the start, under LRU."""


@dataclass(frozen=True)
class ForwardTraffic:
    """The traffic of one forward, of all its sequences together."""

    number: int
    kind: str  # of the KV-caching scheme's pass; "" if the engine reported none
    rows: tuple[int, ...]
    blocks: tuple[int, ...]  # the current block of each row
    traffic: Traffic


@dataclass  # not frozen: it counts until its forward ends
class ForwardCounters:
    """The counters of one forward, or of all finished ones."""

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
    last_layer: int = -1  # the last layer served
    transfers: dict[str, Transfer] = field(default_factory=dict)

    @property
    def denoising_forwards(self) -> int:
        """1 for a forward that served a layer and denoises, otherwise 0."""
        return int(self.last_layer >= 0 and self.kind not in KV_ONLY_KINDS)

    def add(self, other: ForwardCounters) -> None:
        """Add another's counts, except vanilla's, which are replayed later."""
        self.forwards += other.forwards
        self.used += other.used
        self.hits += other.hits
        self.on_cpu += other.on_cpu
        self.stall_seconds += other.stall_seconds
        self.seconds += other.seconds
        for tier, transfer in other.transfers.items():
            self.add_transfer(tier, transfer)

    def add_transfer(self, tier: str, transfer: Transfer) -> None:
        self.transfers[tier] = self.transfers.get(tier, Transfer()).plus(transfer)


@dataclass  # not frozen: it is appended to
class TrafficLog:
    """The traffic of a store, by forward (the last ``LOGGED_FORWARDS``) and in total.

    Stores report each layer they serve; the engine reports where a forward starts and ends. Without
    such reports, a layer index that does not increase starts a new forward. Experts loaded between
    forwards count in the totals only. All reports come from the serving thread. Vanilla's misses
    are replayed when the log is read; until then each layer's vanilla expert ids are kept.
    """

    expert_bytes: int
    vanilla_slots: SlotsFactory
    stall_clock: StallClock = lambda: 0.0
    _current: ForwardCounters = field(default_factory=ForwardCounters)
    _finished: deque[ForwardCounters] = field(default_factory=lambda: deque(maxlen=LOGGED_FORWARDS))
    _totals: ForwardCounters = field(default_factory=ForwardCounters)  # of finished forwards
    _tracks_vanilla: bool = False
    # Counters, layer, vanilla ids and number of experts; None marks a reset.
    _pending: list[tuple[ForwardCounters, int, torch.Tensor, int] | None] = field(
        default_factory=list
    )
    _pending_ids: int = 0
    _vanilla_caches: dict[int, Slots] = field(default_factory=dict)

    def track_vanilla(self) -> None:
        """Count vanilla's misses from now on; raises RuntimeError after the first forward."""
        if self._totals.used or self._current.used:
            raise RuntimeError("vanilla's cache would start empty while the store's does not")
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
        """The forward is over."""
        if self._current.start_time is not None:
            self._current.seconds = time.perf_counter() - self._current.start_time
        self._finish_forward()

    def log_layer(
        self, layer: int, request: ExpertRequest, *, used: int, hits: int, on_cpu: int = 0
    ) -> None:
        """A layer is served: experts used, those of them cached, and those the CPU computes."""
        if layer <= self._current.last_layer:
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
        """Experts were fetched from a tier; ``total_bytes`` if they do not have the usual size."""
        num_bytes = experts * self.expert_bytes if total_bytes is None else total_bytes
        if experts:
            self._current.add_transfer(tier, Transfer(experts, num_bytes))

    def log_reset(self) -> None:
        """The cache returns to its initial state, and vanilla's with it; the totals stay."""
        self._finish_forward()
        if self._tracks_vanilla:
            self._pending.append(None)

    @property
    def forwards(self) -> tuple[ForwardTraffic, ...]:
        """The last finished forwards, at most ``LOGGED_FORWARDS``."""
        self._replay_vanilla()
        return tuple(
            ForwardTraffic(one.number, one.kind, one.rows, one.blocks, self._to_traffic(one))
            for one in self._finished
        )

    def traffic(self) -> Traffic:
        """The total of all forwards, including an unfinished one."""
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
        counters.forwards = counters.denoising_forwards
        counters.stall_seconds = self.stall_clock() - self._totals.stall_seconds
        self._totals.add(counters)
        if counters.last_layer >= 0:
            self._finished.append(counters)
        # Without reports from the engine, the next forward counts as one of the same kind.
        number = counters.number + (counters.last_layer >= 0)
        self._current = ForwardCounters(number, counters.kind, counters.rows, counters.blocks)

    def _replay_vanilla(self) -> None:
        """Serve the pending vanilla requests from vanilla's simulated caches."""
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
