"""Lack of memory is one line with the size and the place, whatever reports it."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
import torch

from coterie.cli import entry
from coterie.loading import free_memory as memory
from coterie.loading.memory_errors import is_out_of_memory, out_of_memory_message
from coterie.model.weights import allocate
from coterie.testing import read_spec, tiny_config

HUGE = 1 << 60


def raised(cause: Callable[[], object]) -> BaseException:
    try:
        cause()
    except Exception as error:
        return error
    raise AssertionError("there was memory")


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("cause", "size"),
    [
        (lambda: torch.zeros(HUGE, dtype=torch.uint8), "iB was"),
        (lambda: np.zeros(HUGE, dtype=np.uint8), "1.00 EiB"),
        (lambda: bytearray(HUGE), "more memory"),
        (lambda: fail(MemoryError()), "more memory"),
        (lambda: fail(OSError(errno.ENOMEM, "Cannot allocate memory")), "more memory"),
        (lambda: fail(RuntimeError("can't start new thread")), "a new thread"),
        (lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")),
         "2.50 GiB"),
    ],
)  # fmt: skip
def test_every_report_is_known(cause: Callable[[], object], size: str) -> None:
    error = raised(cause)
    assert is_out_of_memory(error)
    message = out_of_memory_message(error)
    assert message.startswith("out of memory: ")
    assert "\n" not in message
    assert size in message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(5, "I/O"), KeyError(1)])
def test_other_errors_are_others(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_the_part_that_wanted_it_is_named() -> None:
    _, spec = read_spec(tiny_config("llada2", vocab_size=1 << 24, hidden_size=1 << 24))
    error = raised(lambda: allocate(spec, torch.float32, torch.device("cpu")))
    assert "model/weights.py: allocate" in out_of_memory_message(error)


def test_the_command_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "with_new_names", lambda _arguments: bytearray(HUGE))
    assert entry.run(["policies"]) == 2
    assert capsys.readouterr().err.startswith("coterie: out of memory: ")
    monkeypatch.setattr(entry, "with_new_names", lambda _: fail(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        entry.run(["policies"])


def test_a_limit_of_address_space_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_memory(torch.device("cpu"))
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _kind: (1 << 20, 1 << 20))
    assert memory.free_memory(torch.device("cpu")) == 0
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _kind: (1 << 50, 1 << 50))
    assert memory.free_memory(torch.device("cpu")) == pytest.approx(free, rel=0.5)
