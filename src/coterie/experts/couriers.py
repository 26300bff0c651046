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

from coterie.experts.tiers import Tier

READERS = 4  # fetches in flight

Table = NDArray[np.int64] | NDArray[np.bool_]


class Courier(Protocol):
    """Between the slots of a store and the tier that holds every expert.

    Where computing is only asked for and done later, the device itself keeps the order: ``join``
    and ``computed`` say what comes before what, and the host need not wait.
    """

    @property
    def waited(self) -> float:
        """Seconds so far in which computing stood still for what is brought; asks nobody to wait,
        and leaves out what is not over yet."""
        ...

    def bring(self, layer: int, expert: int, into: Tensor) -> Future[str]:
        """Begin to fill a slot [bytes] uint8, which nothing asked for before the last ``computed``
        may read afterwards. The future is done as soon as the host has no part in it any more, and
        names the tier that the expert was found in."""
        ...

    def join(self, coming: Collection[Future[str]]) -> None:
        """What is computed from now on finds these in their slots, or raises what went wrong."""
        ...

    def computed(self) -> None:
        """What was asked to compute until now is to be done before what is brought from now on."""
        ...

    def settle(self, coming: Collection[Future[str]]) -> None:
        """Wait until nothing is on its way any more, whatever became of it."""
        ...

    def there(self, table: Table) -> Tensor:
        """A copy of such a table where it is computed; the table may change at once."""
        ...


@dataclass  # not frozen: it counts its waiting
class Readers:
    """Threads that fetch into memory of the host, where all is computed when the next is asked."""

    tier: Tier
    waited: float = 0.0
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(READERS, "coterie-experts")
    )

    def bring(self, layer: int, expert: int, into: Tensor) -> Future[str]:
        return self._threads.submit(self.tier.fetch, layer, expert, into)

    def join(self, coming: Collection[Future[str]]) -> None:
        began = time.perf_counter()
        for one in coming:
            one.result()
        self.waited += time.perf_counter() - began

    def computed(self) -> None:
        """Nothing to say: whoever asks for the next slab has computed with the last."""

    def settle(self, coming: Collection[Future[str]]) -> None:
        wait(coming)

    def there(self, table: Table) -> Tensor:
        return torch.from_numpy(table.copy())
