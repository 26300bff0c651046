"""Batches from a forked process. A thread holds the interpreter lock and costs 1.6 times more.

Shapes: B rows, L positions, n = L / block blocks.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing as mp
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor

from coterie.errors import CoterieError

DEAD_PROCESS = "a process of the training has ended; memory may have run out"
PR_SET_PDEATHSIG = 1
PREFETCH_BYTES = 1 << 20  # of each worker
SIGN = b"."
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

    A batch depends on its step only, so a resumed run gets the same batches. Create it before the
    workers: only the process itself may hold the writing ends, so that its end is noticed.
    """

    def __init__(
        self, make_batch: BatchFunction, start: int, stop: int, *, num_workers: int = 1
    ) -> None:
        pipes = [FORK_CONTEXT.Pipe(duplex=False) for _ in range(num_workers)]
        self._readers = [reader for reader, _ in pipes]
        writers = [writer for _, writer in pipes]
        for writer in writers:
            with suppress(OSError):  # a user without rights may have only so much
                fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, PREFETCH_BYTES)
        self._process = start_process(_produce_batches, make_batch, start, stop, writers)
        for writer in writers:
            writer.close()

    def next_batch(self, worker: int = 0) -> TrainingBatch:
        """The next part of a worker; raises CoterieError if the batch process has ended."""
        try:
            return pickle.loads(self._readers[worker].recv_bytes())
        except EOFError:
            raise CoterieError(DEAD_PROCESS) from None

    def close(self) -> None:
        """Terminate the batch process."""
        self._process.terminate()
        self._process.join()


class LeaderBarrier:
    """The leader waits here for all followers, over pipes: a killed process would keep a lock."""

    def __init__(self) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def start_follower(self, run: Callable[[Callable[[], None]], None]) -> None:
        """Start a process that calls ``run`` with its way to wait for the others."""
        ours, theirs = FORK_CONTEXT.Pipe()
        self._processes.append(start_process(run, partial(_wait_for_leader, theirs)))
        theirs.close()  # so that the end of the process is noticed
        self._pipes.append(ours)

    def wait(self) -> None:
        """Wait for all followers; raises CoterieError if one has ended."""
        try:
            for pipe in self._pipes:
                pipe.recv_bytes()
            for pipe in self._pipes:
                pipe.send_bytes(SIGN)
        except (EOFError, OSError):
            raise CoterieError(DEAD_PROCESS) from None

    def close(self) -> None:
        """Terminate the followers."""
        for process in self._processes:
            process.terminate()
            process.join()


def _wait_for_leader(pipe: Connection) -> None:
    pipe.send_bytes(SIGN)
    pipe.recv_bytes()


def start_process(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start a forked process with one thread that is killed if this process ends."""
    all_args = (os.getpid(), target, *args)
    process = FORK_CONTEXT.Process(target=_run_in_child, args=all_args, daemon=True)
    process.start()
    return process


def _run_in_child(parent: int, target: Callable[..., None], *args: object) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before, and this process would hold its locks for ever
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    target(*args)


def _produce_batches(
    make_batch: BatchFunction, start: int, stop: int, writers: Sequence[Connection]
) -> None:
    for step in range(start, stop):
        for writer, part in zip(writers, make_batch(step).split(len(writers)), strict=True):
            writer.send_bytes(pickle.dumps(part))
