"""Fetchers: they copy experts from a tier into a store's slots while the host computes."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.offload.tiers import Tier

FETCH_THREADS = 4  # fetches in flight

NumpyTable = NDArray[np.int64] | NDArray[np.bool_]


class ExpertFetcher(Protocol):
    """Copies experts from a tier into a store's slots.

    On a device that computes asynchronously, ``wait`` and ``mark_computed`` order copies and
    compute on the device itself; the host does not wait.
    """

    @property
    def stall_seconds(self) -> float:
        """Seconds in which compute waited for fetches; waits that are not over do not count."""
        ...

    def fetch_async(self, layer: int, expert: int, target: Tensor) -> Future[str]:
        """Start to fill a slot [bytes] uint8; returns the tier once the host's part is done.

        The slot must not be read by compute enqueued before the last ``mark_computed``.
        """
        ...

    def wait(self, fetches: Collection[Future[str]]) -> None:
        """Make compute enqueued from now on see these fetches; raises the error of a failed one."""
        ...

    def mark_computed(self) -> None:
        """Make fetches started from now on wait for the compute enqueued so far."""
        ...

    def drain(self, fetches: Collection[Future[str]]) -> None:
        """Wait on the host until nothing is in flight, whether it succeeded or not."""
        ...

    def to_device(self, table: NumpyTable) -> Tensor:
        """Copy a table to the compute device; the source may change right afterwards."""
        ...


def fetch_threads() -> ThreadPoolExecutor:
    """The threads of one fetcher."""
    return ThreadPoolExecutor(FETCH_THREADS, "coterie-experts")


@dataclass  # not frozen: it counts its waits
class ThreadedFetcher:
    """Threads that fetch into host memory, for a device that computes synchronously."""

    tier: Tier
    stall_seconds: float = 0.0
    _threads: ThreadPoolExecutor = field(default_factory=fetch_threads)

    def fetch_async(self, layer: int, expert: int, target: Tensor) -> Future[str]:
        return self._threads.submit(self.tier.fetch, layer, expert, target)

    def wait(self, fetches: Collection[Future[str]]) -> None:
        start = time.perf_counter()
        for fetch in fetches:
            fetch.result()
        self.stall_seconds += time.perf_counter() - start

    def mark_computed(self) -> None:
        """No order to keep: compute is done when the caller asks for the next slab."""

    def drain(self, fetches: Collection[Future[str]]) -> None:
        wait(fetches)

    def to_device(self, table: NumpyTable) -> Tensor:
        return torch.from_numpy(table.copy())
