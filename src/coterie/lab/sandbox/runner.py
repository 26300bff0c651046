"""Runs programs behind the best fence that works here, some at a time."""

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

from coterie.errors import CoterieError
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
# Does as the launcher does, from inside; the alarm ends it, for nobody answers.
FAKE_EXIT_PROGRAM = """
import os, signal
signal.setitimer(signal.ITIMER_REAL, 0.1)
os.write(4, b".")
os.read(3, 2)
"""
STARTUP_SECONDS = 20.0  # seconds that a warden may take before and after its program
MAX_REPLY = 4096  # bytes: more than a warden ever says
MAX_ATTEMPTS = 3
TEMPORARY_UIDS = range(61184, 65520)  # ids that systems keep for users who live for a moment


def run_program(
    program: str, limits: Limits = DEFAULT_LIMITS, trust: bool = False
) -> ExecutionResult:
    """Whether ``program``, a whole Python text, runs to its end without an error.

    An exit on the way, of whatever status, is no pass. CoterieError where nothing can keep it in
    and it is not trusted, or where no sandbox starts any more. Policies often write the same
    program: its verdict is remembered.
    """
    return _run_cached(require_backend(trust), program, limits)


def run_programs(
    programs: Sequence[str],
    limits: Limits = DEFAULT_LIMITS,
    trust: bool = False,
    *,
    workers: int | None = None,
) -> list[ExecutionResult]:
    """Every program's verdict, in order; ``workers`` at a time (one for each core)."""
    backend = require_backend(trust)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: _run_cached(backend, program, limits), programs))


def available_backend() -> str | None:
    """What keeps programs in on this machine, "bubblewrap" or "namespaces", if anything does."""
    return next(
        (backend.name for backend in backend_candidates() if _backend_problem(backend) is None),
        None,
    )


def require_backend(trust: bool = False) -> SandboxBackend:
    """The best fence that works; without any, none at all if trusted and a CoterieError if not."""
    problems: list[str] = []
    for backend in backend_candidates():
        problem = _backend_problem(backend)
        if problem is None:
            return backend
        problems.append(f"{backend.name}: {problem}")
    if trust:
        return Unsandboxed()
    raise CoterieError(
        "nothing here can keep generated code in"
        f" ({'; '.join(dict.fromkeys(problems)) or 'this needs Linux'});"
        " install bubblewrap, allow user namespaces, or pass --trust-generated-code"
    )


@cache
def _backend_problem(backend: SandboxBackend) -> str | None:
    """Why a fence does not work, tried once: what is right must pass, an early exit must not."""
    try:
        result = _run_in(backend, "import math\nassert math.sqrt(4) == 2", PROBE_LIMITS)
        if not result.passed:
            return f"a right program ends with {result.reason}"
        if _run_in(backend, FAKE_EXIT_PROGRAM, PROBE_LIMITS).passed:
            return "a program that only claims to have ended passes"
    except (CoterieError, OSError) as error:
        return str(error)
    return None


@lru_cache(maxsize=4096)
def _run_cached(backend: SandboxBackend, program: str, limits: Limits) -> ExecutionResult:
    return _run_in(backend, program, limits)


def _run_in(backend: SandboxBackend, program: str, limits: Limits) -> ExecutionResult:
    """Asks again when the sandbox itself, and not the program, did not get going."""
    error_line = ""
    for _ in range(MAX_ATTEMPTS):
        with backend.supervisor_command(limits) as command:
            started, result, error_line = _run_supervisor(command, program, limits)
        if started:
            return result
    raise CoterieError(f"the sandbox does not start: {error_line or 'it says nothing'}")


def _run_supervisor(
    command: SupervisorCommand, program: str, limits: Limits
) -> tuple[bool, ExecutionResult, str]:
    """Whether the program was begun, what came of it, and the last complaint of what ran it."""
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
        case ["begun", ("passed" | "failed" | "timeout") as status, reason, *_]:
            return True, ExecutionResult(status, reason), error_line
        case ["begun", *_]:
            return True, ExecutionResult("failed", "ended together with its sandbox"), error_line
        case _:
            return False, ExecutionResult("failed"), error_line


def _make_request(command: SupervisorCommand, program: str, limits: Limits) -> dict[str, object]:
    """What the warden is told. ``uid`` is new each time, for limits that count by user."""
    return {
        "program": program.encode("utf-8", "replace").decode(),  # a lone surrogate is no text
        "folder": command.folder,
        "uid": random.SystemRandom().choice(TEMPORARY_UIDS) if command.separate_user else 0,
        "apart": command.separate_user,
        "alone": command.own_pid_namespace,
        "seconds": limits.wall_seconds,
        "processor": limits.cpu_seconds,
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
        pass  # it did not start: its complaint says why


def _read_streams(fds: tuple[int, int], seconds: float) -> tuple[bytes, bytes]:
    """What a warden says and complains of, until it ends, says too much, or takes too long."""
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
