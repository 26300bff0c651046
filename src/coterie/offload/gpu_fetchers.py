"""A GPU's couriers: copies queue beside computing, and events alone keep the order.

Copies stand in one queue, in the order in which they were asked for. What the current stream was
asked before ``computed`` comes before every copy asked for after it; ``join`` holds the current
stream, not the host, until the copies so far are done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from coterie.offload.fetchers import FETCH_THREADS, NumpyTable
from coterie.offload.tiers import HOST, HostTier

DONE_FETCH: Future[str] = Future()
DONE_FETCH.set_result(HOST)


class CopyStream:
    """The ``queue`` of copies of one device, and how long its computing stood still for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)
        self._stall_seconds = 0.0  # seconds
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Ask for a copy out of pinned memory, which must stand until the copy is done."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def synchronize_copies(self) -> None:
        """The host waits, at rest, until the copies so far are done."""
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        event.synchronize()

    def wait_for_compute(self) -> None:
        """Copies asked for from now on wait for what computing was asked until now."""
        self.stream.wait_stream(torch.cuda.current_stream(self._device))

    def block_compute(self, wait_on_host: Callable[[], None] = lambda: None) -> None:
        """Computing asked for from now on waits for the copies so far, and for the host's part."""
        current = torch.cuda.current_stream(self._device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # This one comes to pass as soon as there is nothing left to compute.
        start.record(current)
        wait_on_host()
        current.wait_stream(self.stream)
        end.record(current)
        self._stalls.append((start, end))
        self._sum_finished_stalls()

    def synchronize(self) -> None:
        """The host waits until no copy is left."""
        self.stream.synchronize()

    @property
    def stall_seconds(self) -> float:
        """Seconds of stalls that are over."""
        self._sum_finished_stalls()
        return self._stall_seconds

    def to_device(self, table: NumpyTable) -> Tensor:
        """Pinned memory is kept by its allocator until the copy out of it is done."""
        pinned = torch.from_numpy(table).pin_memory()
        return pinned.to(self._device, non_blocking=True)

    def _sum_finished_stalls(self) -> None:
        while self._stalls and self._stalls[0][1].query():
            start, end = self._stalls.popleft()
            self._stall_seconds += start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class PinnedCopyFetcher:
    """Straight out of pinned host memory that holds every expert: the host only asks."""

    source: HostTier
    stream: CopyStream

    @property
    def stall_seconds(self) -> float:
        return self.stream.stall_seconds

    def fetch_async(self, layer: int, expert: int, target: Tensor) -> Future[str]:
        self.stream.copy(self.source.blobs[layer][expert], target)
        return DONE_FETCH

    def wait(self, fetches: Collection[Future[str]]) -> None:
        del fetches
        self.stream.block_compute()

    def mark_computed(self) -> None:
        self.stream.wait_for_compute()

    def drain(self, fetches: Collection[Future[str]]) -> None:
        del fetches
        self.stream.synchronize()

    def to_device(self, table: NumpyTable) -> Tensor:
        return self.stream.to_device(table)


class PinnedSource(Protocol):
    """Pinned host memory for some experts, which finds the others."""

    def pin(self, layer: int, expert: int) -> AbstractContextManager[tuple[Tensor, str]]:
        """An expert's bytes, which stay where they are until this is left, and the tier that they
        were found in; from any thread."""
        ...


@dataclass(frozen=True)
class StagedFetcher:
    """Out of pinned memory that holds some experts: threads wait for the others, and copy."""

    source: PinnedSource
    stream: CopyStream
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(FETCH_THREADS, "coterie-experts")
    )

    @property
    def stall_seconds(self) -> float:
        return self.stream.stall_seconds

    def fetch_async(self, layer: int, expert: int, target: Tensor) -> Future[str]:
        return self._threads.submit(self._stage, layer, expert, target)

    def wait(self, fetches: Collection[Future[str]]) -> None:
        def wait_on_host() -> None:
            for fetch in fetches:
                fetch.result()

        self.stream.block_compute(wait_on_host)

    def mark_computed(self) -> None:
        self.stream.wait_for_compute()

    def drain(self, fetches: Collection[Future[str]]) -> None:
        wait(fetches)
        self.stream.synchronize()

    def to_device(self, table: NumpyTable) -> Tensor:
        return self.stream.to_device(table)

    def _stage(self, layer: int, expert: int, target: Tensor) -> str:
        # Threads do not inherit the mode, and slots may be made inside it.
        with torch.inference_mode(), self.source.pin(layer, expert) as (blob, tier):
            self.stream.copy(blob, target)
            self.stream.synchronize_copies()
            return tier
