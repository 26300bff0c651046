"""Fetchers for a GPU: copies run on a stream of their own, ordered with compute by events.

All copies are in one stream, in the order of their fetches. ``mark_computed`` makes later copies
wait for the compute enqueued so far. ``wait`` makes later compute wait for the copies so far,
without blocking the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.offload.fetchers import NumpyTable, fetch_threads
from coterie.offload.host_cache import HostCache
from coterie.offload.tiers import HOST, HostTier

DONE_FETCH: Future[str] = Future()
DONE_FETCH.set_result(HOST)


class CopyStream:
    """One device's stream of copies; it measures how long compute waited for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)
        self._stall_seconds = 0.0
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Enqueue a copy from pinned memory, which must not change until the copy is done."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def synchronize_copies(self) -> None:
        """Block the host, without spinning, until the copies so far are done."""
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        event.synchronize()

    def wait_for_compute(self) -> None:
        """Make copies enqueued from now on wait for the compute enqueued so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self._device))

    def block_compute(self, wait_on_host: Callable[[], None] = lambda: None) -> None:
        """Make compute enqueued from now on wait for the copies so far, and for the host's part."""
        current = torch.cuda.current_stream(self._device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The start event fires when the compute enqueued so far is done.
        start.record(current)
        wait_on_host()
        current.wait_stream(self.stream)
        end.record(current)
        self._stalls.append((start, end))
        self._sum_finished_stalls()

    def synchronize(self) -> None:
        """Block the host until no copy is left."""
        self.stream.synchronize()

    @property
    def stall_seconds(self) -> float:
        """Seconds of finished stalls."""
        self._sum_finished_stalls()
        return self._stall_seconds

    def to_device(self, table: NumpyTable) -> Tensor:
        """Copy a table to the device; PyTorch keeps the pinned source until the copy is done."""
        pinned = torch.from_numpy(table).pin_memory()
        return pinned.to(self._device, non_blocking=True)

    def _sum_finished_stalls(self) -> None:
        while self._stalls and self._stalls[0][1].query():
            start, end = self._stalls.popleft()
            self._stall_seconds += start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class GpuFetcher:
    """Copies experts from pinned host memory into GPU slots.

    From a ``HostTier``, which holds every expert, copies are enqueued directly. For a
    ``HostCache``, threads read the experts in, and copy them.
    """

    source: HostTier | HostCache
    stream: CopyStream
    _threads: ThreadPoolExecutor = field(default_factory=fetch_threads)

    @property
    def stall_seconds(self) -> float:
        return self.stream.stall_seconds

    def fetch_async(self, layer: int, expert: int, target: Tensor) -> Future[str]:
        if not isinstance(self.source, HostTier):
            return self._threads.submit(self._stage, self.source, layer, expert, target)
        self.stream.copy(self.source.blobs[layer][expert], target)
        return DONE_FETCH

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

    def _stage(self, source: HostCache, layer: int, expert: int, target: Tensor) -> str:
        # Threads do not inherit inference mode, in which the slots may have been made.
        with torch.inference_mode(), source.pin(layer, expert) as (blob, tier):
            self.stream.copy(blob, target)
            self.stream.synchronize_copies()
            return tier
