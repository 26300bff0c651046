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

from coterie.lab.training.batch import TrainingBatch

BatchFunction = Callable[[int], TrainingBatch]

PR_SET_PDEATHSIG = 1
FORK_CONTEXT = mp.get_context("fork")


class BatchLoader:
    """One process that makes ``make(start)``, ``make(start + 1)``, ... and splits each over lanes.

    Batch ``i`` depends on ``i`` alone, so that a resumed run sees what the first would have seen.
    """

    def __init__(
        self,
        make_batch: BatchFunction,
        start: int,
        stop: int,
        *,
        num_workers: int = 1,
        prefetch: int = 8,
    ) -> None:
        self.queues: list[Queue] = [FORK_CONTEXT.Queue(prefetch) for _ in range(num_workers)]
        self._process = start_process(_produce_batches, make_batch, start, stop, self.queues)

    def next_batch(self, worker: int = 0) -> TrainingBatch:
        """The next batch of a lane; RuntimeError when the maker has died."""
        while True:
            try:
                return TrainingBatch.from_arrays(self.queues[worker].get(timeout=10))
            except queue.Empty:
                # A forked worker sees the maker as a sibling, which only its parent may ask after.
                if worker == 0 and not self._process.is_alive():
                    raise RuntimeError("the process that makes batches has died") from None

    def close(self) -> None:
        """End the maker."""
        self._process.terminate()
        self._process.join()


def start_process(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start ``target`` in a forked process that dies with this one and uses one thread."""
    process = FORK_CONTEXT.Process(target=_run_in_child, args=(target, *args), daemon=True)
    process.start()
    return process


def _run_in_child(target: Callable[..., None], *args: object) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    target(*args)


def _produce_batches(make_batch: BatchFunction, start: int, stop: int, queues: list[Queue]) -> None:
    for step in range(start, stop):
        for queue_, part in zip(queues, make_batch(step).split(len(queues)), strict=True):
            queue_.put(part.to_arrays())
