"""Batches from a forked process. A thread holds the interpreter lock and costs 1.6 times more."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import pickle
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
    """One process that makes the batches of all steps, and splits each among the workers.

    A batch depends on its step only, so a resumed run gets the same batches.
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
        """The next part of a worker; raises RuntimeError if the batch process has died."""
        while True:
            try:
                return pickle.loads(self.queues[worker].get(timeout=10))
            except queue.Empty:
                # Only the parent process, worker 0, may query the state of its child.
                if worker == 0 and not self._process.is_alive():
                    raise RuntimeError("the process that makes batches has died") from None

    def close(self) -> None:
        """Terminate the batch process."""
        self._process.terminate()
        self._process.join()


def start_process(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start a forked process with one thread that is killed if this process ends."""
    process = FORK_CONTEXT.Process(target=_run_in_child, args=(target, *args), daemon=True)
    process.start()
    return process


def _run_in_child(target: Callable[..., None], *args: object) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    target(*args)


def _produce_batches(make_batch: BatchFunction, start: int, stop: int, queues: list[Queue]) -> None:
    for step in range(start, stop):
        for queue_, part in zip(queues, make_batch(step).split(len(queues)), strict=True):
            queue_.put(pickle.dumps(part))  # a queue would share each tensor's memory
