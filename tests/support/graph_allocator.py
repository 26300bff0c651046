"""CUDA's graph capture on the CPU, with the rules of PyTorch's allocator that a capture can break.

A pool counts its graphs: one whose last graph is freed is never captured into again. A capture that
fails leaves its pool recording, and the random generator in capture, until another one succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class GraphAllocator:
    """Stands in for the parts of ``torch.cuda`` that captures use."""

    def __init__(self) -> None:
        self.pools: dict[int, int] = {}  # living graphs of each pool that was captured into
        self.recording: set[int] = set()  # pools
        self.generator_captures = False
        self.streams = ["default"]
        self.replays = 0
        self._handles = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fakes: dict[str, object] = {
            "CUDAGraph": lambda: FakeGraph(self), "graph_pool_handle": self.handle,
            "Stream": object, "stream": self.stream, "synchronize": lambda: None,
            "current_device": lambda: "cpu",
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def handle(self) -> int:
        self._handles += 1
        return self._handles

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.streams.append(str(stream))
        try:
            yield
        finally:
            self.streams.pop()

    def draw(self) -> None:
        """A random number outside of a capture."""
        if self.generator_captures:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class FakeGraph:
    """A graph. Only ``replayed``, if a test sets it, computes again."""

    def __init__(self, allocator: GraphAllocator) -> None:
        self._allocator, self._pool = allocator, 0
        self.failed = False
        self.replayed: Callable[[], object] = lambda: None

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        allocator = self._allocator
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode")
        if pool in allocator.recording:
            raise RuntimeError("already recording to mempool_id")
        if allocator.pools.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        assert len(allocator.streams) > 1, "a capture needs a stream of its own"
        self._pool, allocator.generator_captures = pool, True
        allocator.recording.add(pool)
        allocator.pools[pool] = allocator.pools.get(pool, 0) + 1

    def capture_end(self) -> None:
        if self.failed:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._allocator.recording.discard(self._pool)
        self._allocator.generator_captures = False

    def replay(self) -> None:
        self._allocator.replays += 1
        self.replayed()

    def __del__(self) -> None:
        if self._pool:
            self._allocator.pools[self._pool] -= 1


def replaying(
    capture: Callable[[Callable[[], Any]], tuple[Any, Callable[[], object]]],
    again: Callable[[Callable[[], Any]], tuple[Any, Callable[[], object]]],
) -> Callable[[Callable[[], Any]], tuple[Any, Callable[[], object]]]:
    """A capture by ``capture`` whose replays compute, as those of ``again`` do."""

    def captured(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        computed: list[Callable[[], object]] = []

        def recorded() -> Any:
            output, replay = again(work)
            computed.append(replay)
            return output

        output, replay = capture(recorded)
        return output, lambda: (replay(), computed[0]())

    return captured
