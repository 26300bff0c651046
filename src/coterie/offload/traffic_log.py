"""The traffic log of an expert store: what each forward used, hit, fetched and waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

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


@dataclass  # not frozen: it counts until its forward ends
class ForwardTraffic:
    """The traffic of one forward, of all its sequences together."""

    number: int
    kind: str  # of the KV-caching scheme's pass; "" if the engine reported none
    rows: tuple[int, ...]
    blocks: tuple[int, ...]  # the current block of each row
    traffic: Traffic
    start_time: float | None = None
    last_layer: int = -1  # the last layer served

    @property
    def denoises(self) -> bool:
        """Whether it served a layer and does more than write keys and values."""
        return self.last_layer >= 0 and self.kind not in KV_ONLY_KINDS


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
    _current: ForwardTraffic = field(init=False)
    _finished: deque[ForwardTraffic] = field(
        init=False, default_factory=lambda: deque(maxlen=LOGGED_FORWARDS)
    )
    _totals: Traffic = field(init=False)  # of finished forwards
    _tracks_vanilla: bool = field(init=False, default=False)
    # Forward, layer, vanilla ids and number of experts; None marks a reset.
    _pending: list[tuple[ForwardTraffic, int, torch.Tensor, int] | None] = field(
        init=False, default_factory=list
    )
    _pending_ids: int = field(init=False, default=0)
    _vanilla_caches: dict[int, Slots] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._totals = self._traffic()
        self._current = ForwardTraffic(0, "", (), (), self._traffic())

    def track_vanilla(self) -> None:
        """Count vanilla's misses from now on; raises RuntimeError after the first forward."""
        if self._totals.experts_used or self._current.traffic.experts_used:
            raise RuntimeError("vanilla's cache would start empty while the store's does not")
        self._tracks_vanilla = True
        self._totals = replace(self._totals, vanilla_misses=0)
        self._current.traffic = replace(self._current.traffic, vanilla_misses=0)

    def begin_forward(
        self, kind: str, rows: tuple[int, ...] = (), blocks: tuple[int, ...] = ()
    ) -> None:
        """Start a forward, to which later reports belong."""
        self._finish_forward()
        self._current = ForwardTraffic(
            self._current.number, kind, rows, blocks, self._traffic(), time.perf_counter()
        )

    def end_forward(self) -> None:
        """End the current forward, and count its seconds."""
        if self._current.start_time is not None:
            self._count(seconds=time.perf_counter() - self._current.start_time)
        self._finish_forward()

    def log_layer(
        self, layer: int, request: ExpertRequest, *, used: int, hits: int, on_cpu: int = 0
    ) -> None:
        """Log a served layer: experts used, those of them cached, and those the CPU computes."""
        if layer <= self._current.last_layer:
            self._finish_forward()
        self._current.last_layer = layer
        self._count(experts_used=used, hits=hits, on_cpu=on_cpu)
        if self._tracks_vanilla and request.routing is not None:
            vanilla_ids = request.routing.vanilla_ids
            self._pending.append((self._current, layer, vanilla_ids, len(request.used)))
            self._pending_ids += vanilla_ids.numel()
            if self._pending_ids > MAX_PENDING_IDS:
                self._replay_vanilla()

    def log_transfer(self, tier: str, experts: int = 1, total_bytes: int | None = None) -> None:
        """Log experts fetched from a tier; ``total_bytes`` if they do not have the usual size."""
        num_bytes = experts * self.expert_bytes if total_bytes is None else total_bytes
        if experts:
            self._count(transfers={tier: Transfer(experts, num_bytes)})

    def log_reset(self) -> None:
        """Log that the cache, and vanilla's, return to their initial state; the totals stay."""
        self._finish_forward()
        if self._tracks_vanilla:
            self._pending.append(None)

    @property
    def forwards(self) -> tuple[ForwardTraffic, ...]:
        """The last finished forwards, at most ``LOGGED_FORWARDS``."""
        self._replay_vanilla()
        return tuple(self._finished)

    def traffic(self) -> Traffic:
        """The total of all forwards, including an unfinished one."""
        self._replay_vanilla()
        total = self._totals + self._current.traffic
        forwards = total.forwards + self._current.denoises
        return replace(total, forwards=forwards, stall_seconds=self.stall_clock())

    def _traffic(self, **counts: Any) -> Traffic:
        """These counts, which are fields of ``Traffic``."""
        zeros = {"forwards": 0, "experts_used": 0, "hits": 0}
        vanilla_misses = 0 if self._tracks_vanilla else None
        fields = {**zeros, "vanilla_misses": vanilla_misses, **counts}
        return Traffic(expert_bytes=self.expert_bytes, **fields)

    def _count(self, **counts: Any) -> None:
        self._current.traffic += self._traffic(**counts)

    def _finish_forward(self) -> None:
        current = self._current
        if current.last_layer < 0 and not current.traffic.transfers:
            return
        stall_seconds = self.stall_clock() - self._totals.stall_seconds
        self._count(forwards=int(current.denoises), stall_seconds=stall_seconds)
        self._totals += current.traffic
        if current.last_layer >= 0:
            self._finished.append(current)
        # Without reports from the engine, the next forward counts as one of the same kind.
        number = current.number + (current.last_layer >= 0)
        self._current = replace(
            current, number=number, traffic=self._traffic(), start_time=None, last_layer=-1
        )

    def _replay_vanilla(self) -> None:
        """Serve the pending vanilla requests from vanilla's simulated caches."""
        for entry in self._pending:
            if entry is None:
                self._vanilla_caches.clear()
                continue
            forward, layer, vanilla_ids, experts = entry
            if layer not in self._vanilla_caches:
                self._vanilla_caches[layer] = self.vanilla_slots(layer)
            used = expert_mask(vanilla_ids.flatten(), experts).cpu().numpy()
            misses = sum(len(wave.loads) for wave in self._vanilla_caches[layer].serve(used))
            counts = self._traffic(vanilla_misses=misses)
            forward.traffic += counts
            if forward is not self._current:
                self._totals += counts
        self._pending.clear()
        self._pending_ids = 0
