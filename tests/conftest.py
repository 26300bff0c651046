"""What every run of the tests sets before torch is imported, and what it could not test."""

from __future__ import annotations

import os
import tempfile
from importlib import import_module

import pytest
from shared_data import missing

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for child processes too

# Before anything imports torch or triton; a GPU shows by its device file.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tile sizes that a GPU's user has measured would make other kernels than the tests expect.
os.environ["COTERIE_CACHE"] = tempfile.mkdtemp(prefix="coterie-tests-")


def pytest_configure(config: pytest.Config) -> None:
    """A process that only gives tests to its workers runs none, and needs no torch."""
    has_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not has_workers:
        config.pluginmanager.register(import_module("process_setup"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    return missing(config.getoption("markexpr"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in missing(terminalreporter.config.getoption("markexpr")):
        terminalreporter.write_sep("!", line, yellow=True, bold=True)
