"""Runs programs in the best sandbox that works on this machine, several at a time."""

from __future__ import annotations

import marshal
import os
import random
import selectors
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

from coterie.errors import CoterieError, TaskError
from coterie.lab.sandbox.backends import (
    ENVIRONMENT,
    SandboxBackend,
    SupervisorCommand,
    Unsandboxed,
    backend_candidates,
)
from coterie.lab.sandbox.result import ExecutionResult, Limits

DEFAULT_LIMITS = Limits()
PROBE_LIMITS = Limits(cpu_seconds=2, wall_seconds=10.0)
# Sends the launcher's report from inside the program. No reply comes, so an alarm ends it.
FAKE_EXIT_PROGRAM = """
import os, signal
signal.setitimer(signal.ITIMER_REAL, 0.1)
os.write(4, b".")
os.read(3, 2)
"""
STARTUP_SECONDS = 20.0  # allowance for the supervisor before and after its program
MAX_REPLY = 4096  # bytes; a supervisor writes less
MAX_ATTEMPTS = 3
TEMPORARY_UIDS = range(61184, 65520)  # ids that systems reserve for transient users


def run_program(
    program: str, limits: Limits = DEFAULT_LIMITS, trust: bool = False
) -> ExecutionResult:
    """Runs ``program``, a complete Python source; it passes if it reaches its end without an error.

    An early exit with any status fails. Results are cached, since policies often write the same
    program. Raises TaskError if no sandbox works and ``trust`` is false.
    """
    return _run_cached(require_backend(trust), program, limits)


def run_programs(
    programs: Sequence[str],
    limits: Limits = DEFAULT_LIMITS,
    trust: bool = False,
    *,
    workers: int | None = None,
) -> list[ExecutionResult]:
    """Runs ``workers`` programs at a time (default: one per core); results in their order."""
    backend = require_backend(trust)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: _run_cached(backend, program, limits), programs))


def available_backend() -> str | None:
    """The sandbox that works on this machine, "bubblewrap" or "namespaces", or None."""
    working = (backend for backend in backend_candidates() if _backend_problem(backend) is None)
    return next((backend.name for backend in working), None)


def require_backend(trust: bool = False) -> SandboxBackend:
    """The best backend that works; without one, ``Unsandboxed`` if ``trust``, else a TaskError."""
    problems: list[str] = []
    for backend in backend_candidates():
        problem = _backend_problem(backend)
        if problem is None:
            return backend
        problems.append(f"{backend.name}: {problem}")
    if trust:
        return Unsandboxed()
    raise TaskError(
        "no sandbox for generated code works here"
        f" ({'; '.join(dict.fromkeys(problems)) or 'sandboxes need Linux'});"
        " install bubblewrap, allow user namespaces, or set `trust`"
    )


@cache
def _backend_problem(backend: SandboxBackend) -> str | None:
    """Why a backend does not work, or None: a correct program must pass, a forged report fail."""
    try:
        result = _run_in(backend, "import math\nassert math.sqrt(4) == 2", PROBE_LIMITS)
        if not result.passed:
            return f"a correct program ends with {result.reason}"
        if _run_in(backend, FAKE_EXIT_PROGRAM, PROBE_LIMITS).passed:
            return "a program that forges its end passes"
    except (CoterieError, OSError) as error:
        return str(error)
    return None


@lru_cache(maxsize=4096)
def _run_cached(backend: SandboxBackend, program: str, limits: Limits) -> ExecutionResult:
    return _run_in(backend, program, limits)


def _run_in(backend: SandboxBackend, program: str, limits: Limits) -> ExecutionResult:
    """Retries when the sandbox, not the program, failed to start."""
    error_line = ""
    for _ in range(MAX_ATTEMPTS):
        with backend.supervisor_command(limits) as command:
            started, result, error_line = _run_supervisor(command, program, limits)
        if started:
            return result
    raise TaskError(f"the sandbox does not start: {error_line or 'no error message'}")


def _run_supervisor(
    command: SupervisorCommand, program: str, limits: Limits
) -> tuple[bool, ExecutionResult, str]:
    """Whether the program started, its result, and the last line on the supervisor's stderr."""
    process = subprocess.Popen(
        command.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=command.inherited_fds,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            request = marshal.dumps(_make_request(command, program, limits))
            _write_all(process.stdin.fileno(), len(request).to_bytes(8, "big") + request)
            fds = (process.stdout.fileno(), process.stderr.fileno())
            reply, stderr = _read_streams(fds, limits.wall_seconds + STARTUP_SECONDS)
        finally:
            process.kill()
    lines = reply.decode("utf-8", "replace").split("\n")
    error_line = stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    match lines:
        case ["started", ("passed" | "failed" | "timeout") as status, reason, *_]:
            return True, ExecutionResult(status, reason), error_line
        case ["started", *_]:
            return True, ExecutionResult("failed", "ended its sandbox"), error_line
        case _:
            return False, ExecutionResult("failed"), error_line


def _make_request(command: SupervisorCommand, program: str, limits: Limits) -> dict[str, object]:
    """The supervisor's request. Each program gets a fresh ``uid``: some limits count per user."""
    return {
        "program": program.encode("utf-8", "replace").decode(),  # replaces lone surrogates
        "folder": command.folder,
        "uid": random.SystemRandom().choice(TEMPORARY_UIDS) if command.separate_user else 0,
        "separate_user": command.separate_user,
        "own_pid_namespace": command.own_pid_namespace,
        "wall_seconds": limits.wall_seconds,
        "cpu_seconds": limits.cpu_seconds,
        "memory": limits.memory,
        "output": limits.output,
        "processes": limits.processes,
        "limits": [
            ("RLIMIT_CPU", limits.cpu_seconds, limits.cpu_seconds + 1),
            ("RLIMIT_AS", limits.memory, limits.memory),
            ("RLIMIT_FSIZE", limits.disk, limits.disk),
            ("RLIMIT_NPROC", limits.processes, limits.processes),
            ("RLIMIT_NOFILE", limits.files, limits.files),
            ("RLIMIT_CORE", 0, 0),
        ],
    }


def _write_all(fd: int, content: bytes) -> None:
    try:
        while content:
            content = content[os.write(fd, content) :]
    except BrokenPipeError:
        pass  # it did not start; its stderr holds the reason


def _read_streams(fds: tuple[int, int], seconds: float) -> tuple[bytes, bytes]:
    """The last bytes of both streams, read until they close or ``seconds`` have passed."""
    received = dict.fromkeys(fds, b"")
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for fd in fds:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and (remaining := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(remaining):
                chunk = os.read(key.fd, MAX_REPLY)
                received[key.fd] = (received[key.fd] + chunk)[-MAX_REPLY:]
                if not chunk:
                    selector.unregister(key.fd)
    return received[fds[0]], received[fds[1]]
