"""How a process runs tests: few threads, examples that stay the same, poisoned memory.

A plugin, which tests/conftest.py registers.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from coterie.engine import engine
from coterie.loading.load import Model, load_model

settings.register_profile("default", deadline=None, max_examples=10, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A shell's background job ignores interrupts, and the tests' child processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers of pytest-xdist share the cores: more threads would only wait for each other.
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if PARALLEL else int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through it for garbage takes a tenth of some tests."""
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten memory is NaN (integers: their largest value), so that reading it shows."""
    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoning(Tensor.new_empty))


def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.requires_grad:
            with torch.no_grad():
                return tensor.fill_(poison(tensor.dtype))
        return tensor.fill_(poison(tensor.dtype))

    return poisoned


@pytest.fixture
def embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model, where all its experts are in memory, is read once a process."""
    monkeypatch.setattr(engine, "load_model", load_model_once)


def load_model_once(name: str | None = None, **options: object) -> Model:
    if name is not None or options["expert_memory"] is not None:
        return load_model(name, **options)
    return embedded_model(options["dtype"], options["device"], options["expert_dtype"])


@cache
def embedded_model(dtype: object, device: object, expert_dtype: object) -> Model:
    return load_model(dtype=dtype, device=device, expert_dtype=expert_dtype)


@cache
def poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max
