"""How every test runs: Triton interpreted where there is no GPU, few threads, poisoned memory."""

import os
import signal

# Before anything imports torch or triton; a GPU shows by its device file.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from shared_data import missing
from torch import Tensor

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Who runs the tests in the background may have them ignore interrupts, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_report_header() -> list[str]:
    return missing()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in missing():
        terminalreporter.write_sep("!", line, yellow=True, bold=True)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN (integers: their largest): reading it shows."""
    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoning(Tensor.new_empty))


def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = make(*args, **kwargs)
        with torch.no_grad():
            if made.is_floating_point() or made.is_complex():
                return made.fill_(float("nan"))
            return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).max)

    return poisoned
