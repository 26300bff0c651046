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

from coterie.experts.couriers import READERS, Table
from coterie.experts.tiers import HOST, InMemory

DONE: Future[str] = Future()
DONE.set_result(HOST)


class Lane:
    """The ``queue`` of copies of one device, and how long its computing stood still for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.queue = torch.cuda.Stream(device)
        self._over = 0.0  # seconds
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def copy(self, source: Tensor, into: Tensor) -> None:
        """Ask for a copy out of pinned memory, which must stand until the copy is done."""
        with torch.cuda.stream(self.queue):
            into.copy_(source, non_blocking=True)

    def arrive(self) -> None:
        """The host waits, at rest, until the copies so far are done."""
        done = torch.cuda.Event(blocking=True)
        done.record(self.queue)
        done.synchronize()

    def after_computing(self) -> None:
        """Copies asked for from now on wait for what computing was asked until now."""
        self.queue.wait_stream(torch.cuda.current_stream(self._device))

    def before_computing(self, wait_on_host: Callable[[], None] = lambda: None) -> None:
        """Computing asked for from now on waits for the copies so far, and for the host's part."""
        current = torch.cuda.current_stream(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # This one comes to pass as soon as there is nothing left to compute.
        first.record(current)
        wait_on_host()
        current.wait_stream(self.queue)
        last.record(current)
        self._stalls.append((first, last))
        self._add_up()

    def rest(self) -> None:
        """The host waits until no copy is left."""
        self.queue.synchronize()

    @property
    def stalled(self) -> float:
        """Seconds of stalls that are over."""
        self._add_up()
        return self._over

    def there(self, table: Table) -> Tensor:
        """Pinned memory is kept by its allocator until the copy out of it is done."""
        pinned = torch.from_numpy(table).pin_memory()
        return pinned.to(self._device, non_blocking=True)

    def _add_up(self) -> None:
        while self._stalls and self._stalls[0][1].query():
            first, last = self._stalls.popleft()
            self._over += first.elapsed_time(last) / 1e3


@dataclass(frozen=True)
class Copies:
    """Straight out of pinned host memory that holds every expert: the host only asks."""

    source: InMemory
    lane: Lane

    @property
    def waited(self) -> float:
        return self.lane.stalled

    def bring(self, layer: int, expert: int, into: Tensor) -> Future[str]:
        self.lane.copy(self.source.blobs[layer][expert], into)
        return DONE

    def join(self, coming: Collection[Future[str]]) -> None:
        del coming
        self.lane.before_computing()

    def computed(self) -> None:
        self.lane.after_computing()

    def settle(self, coming: Collection[Future[str]]) -> None:
        del coming
        self.lane.rest()

    def there(self, table: Table) -> Tensor:
        return self.lane.there(table)


class Lender(Protocol):
    """Pinned host memory for some experts, which finds the others."""

    def lent(self, layer: int, expert: int) -> AbstractContextManager[tuple[Tensor, str]]:
        """An expert's bytes, which stay where they are until this is left, and the tier that they
        were found in; from any thread."""
        ...


@dataclass(frozen=True)
class Relays:
    """Out of pinned memory that holds some experts: threads wait for the others, and copy."""

    source: Lender
    lane: Lane
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(READERS, "coterie-experts")
    )

    @property
    def waited(self) -> float:
        return self.lane.stalled

    def bring(self, layer: int, expert: int, into: Tensor) -> Future[str]:
        return self._threads.submit(self._relay, layer, expert, into)

    def join(self, coming: Collection[Future[str]]) -> None:
        def wait_on_host() -> None:
            for one in coming:
                one.result()

        self.lane.before_computing(wait_on_host)

    def computed(self) -> None:
        self.lane.after_computing()

    def settle(self, coming: Collection[Future[str]]) -> None:
        wait(coming)
        self.lane.rest()

    def there(self, table: Table) -> Tensor:
        return self.lane.there(table)

    def _relay(self, layer: int, expert: int, into: Tensor) -> str:
        # Threads do not inherit the mode, and slots may be made inside it.
        with torch.inference_mode(), self.source.lent(layer, expert) as (blob, found):
            self.lane.copy(blob, into)
            self.lane.arrive()
            return found
