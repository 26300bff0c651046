"""Batches from a forked process. A thread holds the interpreter lock and costs 1.6 times more.

Shapes: B rows, L positions, n = L / block blocks.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue

import torch
from torch import Tensor

from coterie.errors import CoterieError

DEAD_PROCESS = "a process of the training has ended; memory may have run out"
PR_SET_PDEATHSIG = 1
FORK_CONTEXT = mp.get_context("fork")


@dataclass(frozen=True)
class TrainingBatch:
    """Noised rows and their targets."""

    tokens: Tensor  # [B, L] int64, masked inputs
    positions: Tensor  # [B, L] int64, from the start of the problem
    block_mask: Tensor  # [B, n, n] bool: query block sees key block
    targets: Tensor  # [B, L] int64; -100: no loss
    weights: Tensor  # [B, L] float32, of each target's loss
    tasks: Tensor | None = None  # [B, L] int64, for the log only
    loss_divisor: float = 0.0  # 0: the sum of the batch's weights

    def total_weight(self) -> float:
        """The divisor of the loss: the sum of weights over target positions."""
        return self.loss_divisor or float(self.weights[self.targets >= 0].sum())

    def split(self, parts: int) -> list[TrainingBatch]:
        """Equal parts with the divisor of the whole batch, so that their gradients add up."""
        if len(self.tokens) % parts:
            raise ValueError(f"{len(self.tokens)} rows do not split into {parts} equal parts")
        rows, divisor = len(self.tokens) // parts, self.total_weight()
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        chunks = {name: v.split(rows) for name, v in values.items() if isinstance(v, Tensor)}
        return [
            replace(
                self, **{name: chunk[part] for name, chunk in chunks.items()}, loss_divisor=divisor
            )
            for part in range(parts)
        ]


BatchFunction = Callable[[int], TrainingBatch]


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
        self.process = start_process(_produce_batches, make_batch, start, stop, self.queues)

    def next_batch(self, worker: int = 0) -> TrainingBatch:
        """The next part of a worker; raises CoterieError if the batch process has died."""
        while True:
            try:
                return pickle.loads(self.queues[worker].get(timeout=10))
            except queue.Empty:
                # Only the parent process, worker 0, may query the state of its child.
                if worker == 0 and not self.process.is_alive():
                    raise CoterieError(DEAD_PROCESS) from None

    def close(self) -> None:
        """Terminate the batch process."""
        self.process.terminate()
        self.process.join()


def start_process(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start a forked process with one thread that is killed if this process ends."""
    all_args = (os.getpid(), target, *args)
    process = FORK_CONTEXT.Process(target=_run_in_child, args=all_args, daemon=True)
    process.start()
    return process


def call_when_one_fails(processes: Sequence[BaseProcess], act: Callable[[], None]) -> None:
    """Call ``act``, in a thread, once one of the processes has failed or was killed."""

    def watch() -> None:
        by_sentinel = {process.sentinel: process for process in processes}
        while by_sentinel:
            for sentinel in connection.wait(list(by_sentinel)):
                process = by_sentinel.pop(sentinel)  # type: ignore[call-overload]
                process.join()
                if process.exitcode != 0:
                    return act()

    threading.Thread(target=watch, daemon=True).start()


def _run_in_child(parent: int, target: Callable[..., None], *args: object) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before, and this process would hold its locks for ever
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    target(*args)


def _produce_batches(make_batch: BatchFunction, start: int, stop: int, queues: list[Queue]) -> None:
    for step in range(start, stop):
        for queue_, part in zip(queues, make_batch(step).split(len(queues)), strict=True):
            queue_.put(pickle.dumps(part))  # a queue would share each tensor's memory
