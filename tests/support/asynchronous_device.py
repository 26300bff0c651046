"""A GPU imagined at its worst: streams run when they like, as far as their events allow.

What is asked of a stream is only queued. At every call, and whenever somebody waits, a dice decides
who goes on and how far: one stream may be done with all it has while the other has not begun. A
copy is made in two halves, between which anything may happen; so is computing.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

Work = Callable[[], object]


class World:
    """Streams, and the dice that lets them go on. ``eager``: the chance to, at every call."""

    def __init__(self, seed: int, eager: float = 0.3) -> None:
        self._dice, self._eager = random.Random(seed), eager
        self._streams: list[Stream] = []
        self._here = threading.local()
        self.lock = threading.RLock()
        self.computing = self.stream()

    def stream(self, device: object = None) -> Stream:
        del device
        self._streams.append(Stream(self))
        return self._streams[-1]

    def current(self, device: object = None) -> Stream:
        del device
        return getattr(self._here, "stream", self.computing)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.current(), stream
        try:
            yield
        finally:
            self._here.stream = before

    def compute(self, work: Work) -> None:
        """Ask the current stream for work, done at its beginning and again at its end."""
        for _ in range(2):
            self.current().ask(work)

    def move(self) -> None:
        """Let some streams go on, by lot."""
        with self.lock:
            while self._dice.random() < self._eager and self.step():
                pass

    def step(self) -> bool:
        """One piece of work of some stream that can go on; whether there was one."""
        with self.lock:
            able = [stream for stream in self._streams if stream.able]
            if able:
                self._dice.choice(able).go_on()
            return bool(able)

    def until(self, done: Callable[[], bool]) -> None:
        """Whoever waits: others may get ahead meanwhile, but no more must be asked of anybody."""
        while True:
            with self.lock:
                if done():
                    return
                if not self.step():
                    raise RuntimeError("everybody waits for everybody")

    def drain(self) -> None:
        while self.step():
            pass

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Until ``patch`` is undone, this is what torch.cuda says; a CPU's tensors are there."""
        for name, value in (
            ("Stream", self.stream),
            ("Event", lambda enable_timing=False, blocking=False: Event(self)),
            ("stream", self.on),
            ("current_stream", self.current),
        ):
            patch.setattr(torch.cuda, name, value)
        copy = Tensor.copy_

        def copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if not non_blocking:
                return copy(into, source)
            middle = len(into) // 2
            for part in (slice(None, middle), slice(middle, None)):
                self.current().ask(lambda part=part: copy(into[part], source[part]))
            return into

        patch.setattr(Tensor, "copy_", copied)
        patch.setattr(Tensor, "pin_memory", Tensor.clone)


class Stream:
    """Work in the order in which it was asked for; an entry says whether it can be done yet."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._queue: deque[tuple[Callable[[], bool], Work]] = deque()

    def ask(self, work: Work, when: Callable[[], bool] = lambda: True) -> None:
        with self._world.lock:
            self._queue.append((when, work))
        self._world.move()

    @property
    def able(self) -> bool:
        return bool(self._queue) and self._queue[0][0]()

    def go_on(self) -> None:
        _, work = self._queue.popleft()
        work()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._world)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        wanted = event.asked
        self.ask(lambda: None, when=lambda: event.seen >= wanted)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self._world.until(lambda: not self._queue)


class Event:
    """Counts how often it was asked for, and how often it came to pass."""

    def __init__(self, world: World) -> None:
        self._world, self.asked, self.seen = world, 0, 0

    def record(self, stream: Stream | None = None) -> None:
        self.asked += 1
        number = self.asked

        def happens() -> None:
            self.seen = max(self.seen, number)

        (stream or self._world.current()).ask(happens)

    def query(self) -> bool:
        return self.seen == self.asked

    def synchronize(self) -> None:
        self._world.until(self.query)

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return 1.0
