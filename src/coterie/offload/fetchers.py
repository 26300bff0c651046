"""Who brings experts into slots: threads that read, while the host computes."""

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
    """Between the slots of a store and the tier that holds every expert.

    Where computing is only asked for and done later, the device itself keeps the order: ``join``
    and ``computed`` say what comes before what, and the host need not wait.
    """

    @property
    def stall_seconds(self) -> float:
        """Seconds so far in which computing stood still for what is brought; asks nobody to wait,
        and leaves out what is not over yet."""
        ...

    def fetch_async(self, layer: int, expert: int, target: Tensor) -> Future[str]:
        """Begin to fill a slot [bytes] uint8, which nothing asked for before the last ``computed``
        may read afterwards. The future is done as soon as the host has no part in it any more, and
        names the tier that the expert was found in."""
        ...

    def wait(self, fetches: Collection[Future[str]]) -> None:
        """What is computed from now on finds these in their slots, or raises what went wrong."""
        ...

    def mark_computed(self) -> None:
        """What was asked to compute until now is to be done before what is brought from now on."""
        ...

    def drain(self, fetches: Collection[Future[str]]) -> None:
        """Wait until nothing is on its way any more, whatever became of it."""
        ...

    def to_device(self, table: NumpyTable) -> Tensor:
        """A copy of such a table where it is computed; the table may change at once."""
        ...


@dataclass  # not frozen: it counts its waiting
class ThreadedFetcher:
    """Threads that fetch into memory of the host, where all is computed when the next is asked."""

    tier: Tier
    stall_seconds: float = 0.0
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(FETCH_THREADS, "coterie-experts")
    )

    def fetch_async(self, layer: int, expert: int, target: Tensor) -> Future[str]:
        return self._threads.submit(self.tier.fetch, layer, expert, target)

    def wait(self, fetches: Collection[Future[str]]) -> None:
        start = time.perf_counter()
        for fetch in fetches:
            fetch.result()
        self.stall_seconds += time.perf_counter() - start

    def mark_computed(self) -> None:
        """Nothing to say: whoever asks for the next slab has computed with the last."""

    def drain(self, fetches: Collection[Future[str]]) -> None:
        wait(fetches)

    def to_device(self, table: NumpyTable) -> Tensor:
        return torch.from_numpy(table.copy())
