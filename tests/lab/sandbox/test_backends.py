"""Which backend runs a program, and why one that does not isolate is refused."""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import TaskError
from coterie.lab.sandbox import Limits, backends, require_backend, run_program, runner
from coterie.lab.sandbox.backends import SupervisorCommand
from coterie.lab.sandbox.runner import _backend_problem
from coterie.lab.sandbox.syscalls import (
    BPF_RETURN,
    SECCOMP_ALLOW,
    SYSCALL_TABLES,
    seccomp_filter,
)


def without_bubblewrap(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))


def with_forbidden_bubblewrap(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    bwrap = folder / "bwrap"
    bwrap.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n"
    )
    bwrap.chmod(0o755)
    without_bubblewrap(monkeypatch, folder)


BROKEN_BUBBLEWRAP: list[Callable[[pytest.MonkeyPatch, Path], None]] = [
    without_bubblewrap,
    with_forbidden_bubblewrap,
]


@pytest.mark.parametrize("break_bubblewrap", BROKEN_BUBBLEWRAP)
def test_without_bubblewrap_namespaces_isolate(break_bubblewrap, monkeypatch, tmp_path):
    break_bubblewrap(monkeypatch, tmp_path)
    try:
        backend = require_backend()
    except TaskError:
        pytest.skip("NOT TESTED: this machine allows no namespaces")
    assert backend.name == "namespaces"
    assert run_program("x = 1").passed
    assert not run_program("open('/etc/passwd')").passed


def test_without_any_sandbox_code_is_refused_unless_trusted(monkeypatch):
    monkeypatch.setattr(
        "coterie.lab.sandbox.runner.backend_candidates",
        lambda: [backends.Bubblewrap("/bin/false")],
    )
    with pytest.raises(TaskError, match=r"install bubblewrap.*`trust`"):
        run_program("x = 1")
    with pytest.raises(TaskError, match=r"bubblewrap: .*does not start"):
        require_backend()
    assert isinstance(require_backend(trust=True), backends.Unsandboxed)
    assert run_program("x = 1", trust=True).passed


def test_the_filter_exists_for_two_architectures():
    assert all(len(seccomp_filter(name)) % 8 == 0 for name in SYSCALL_TABLES)
    with pytest.raises(TaskError, match="vax"):
        seccomp_filter("vax")


def show_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tempfile.mkdtemp(dir="/var/tmp")
    os.chmod(folder, 0o755)
    paths = (*backends.visible_paths(), folder)
    monkeypatch.setattr(backends, "visible_paths", lambda: paths)
    monkeypatch.setattr(tempfile, "tempdir", folder)


def show_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(
        backends.script_text("namespaces").replace('"subset=pid"', '""'), "namespaces", "exec"
    )
    original = backends.script_code
    monkeypatch.setattr(
        backends, "script_code", lambda name: code if name == "namespaces" else original(name)
    )
    monkeypatch.setattr(backends, "_proc_covers", list)


def allow_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    allow = struct.pack("=HBBI", BPF_RETURN, 0, 0, SECCOMP_ALLOW)
    monkeypatch.setattr(backends, "seccomp_filter", lambda: allow)


def allow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    original = runner._make_request

    def request(*args: Any) -> dict[str, object]:
        made = original(*args)
        limits = [limit for limit in made["limits"] if limit[0] != "RLIMIT_AS"]  # type: ignore
        return {**made, "limits": limits}

    monkeypatch.setattr(runner, "_make_request", request)


BROKEN_PROMISES = {
    "reads a file of the machine": show_the_machine,
    "reads or writes a file of the kernel": show_the_kernel,
    "opens a network socket": allow_every_call,
    "enlarges a buffer of the kernel": allow_every_call,
    "memory": allow_memory,
}


@pytest.mark.parametrize("promise", BROKEN_PROMISES)
def test_a_backend_that_breaks_a_promise_is_refused(promise, backend, monkeypatch):
    BROKEN_PROMISES[promise](monkeypatch)
    problem = _backend_problem.__wrapped__(backend)
    assert problem is not None
    assert promise in problem


@dataclass(frozen=True)
class Silent:
    """A backend whose supervisor starts a process and never answers."""

    file: Path
    name: str = "silent"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        script = f"sleep 1000 & echo $! > {self.file}; wait"
        yield SupervisorCommand(["/bin/sh", "-c", script], "/tmp", None)


def test_a_sandbox_that_never_answers_ends_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "STARTUP_SECONDS", 1.0)
    with pytest.raises(TaskError, match="does not answer"):
        runner._run_in(Silent(tmp_path / "pid"), "x = 1", "", Limits(wall_seconds=1.0))
    process = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(process)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
