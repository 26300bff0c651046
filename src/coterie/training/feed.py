"""Batches made in a forked process: a thread would hold the interpreter and cost 1.6 times more."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import queue
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue

import torch

from coterie.training.batch import Batch

Make = Callable[[int], Batch]

PR_SET_PDEATHSIG = 1
FORK = mp.get_context("fork")


class Feed:
    """One process that makes ``make(start)``, ``make(start + 1)``, ... and splits each over lanes.

    Batch ``i`` depends on ``i`` alone, so that a resumed run sees what the first would have seen.
    """

    def __init__(
        self, make: Make, start: int, stop: int, *, lanes: int = 1, ahead: int = 8
    ) -> None:
        self.lanes: list[Queue] = [FORK.Queue(ahead) for _ in range(lanes)]
        self._process = fork(_produce, make, start, stop, self.lanes)

    def take(self, lane: int = 0) -> Batch:
        """The next batch of a lane; RuntimeError when the maker has died."""
        while True:
            try:
                return Batch.of(self.lanes[lane].get(timeout=10))
            except queue.Empty:
                # A forked worker sees the maker as a sibling, which only its parent may ask after.
                if lane == 0 and not self._process.is_alive():
                    raise RuntimeError("the process that makes batches has died") from None

    def close(self) -> None:
        """End the maker."""
        self._process.terminate()
        self._process.join()


def fork(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start ``target`` in a forked process that dies with this one and uses one thread."""
    process = FORK.Process(target=_alone, args=(target, *args), daemon=True)
    process.start()
    return process


def _alone(target: Callable[..., None], *args: object) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    target(*args)


def _produce(make: Make, start: int, stop: int, lanes: list[Queue]) -> None:
    for step in range(start, stop):
        for lane, part in zip(lanes, make(step).split(len(lanes)), strict=True):
            lane.put(part.arrays())
