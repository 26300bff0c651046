"""Runs programs and their tests in the best sandbox that works on this machine."""

from __future__ import annotations

import marshal
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from coterie.errors import CoterieError, TaskError
from coterie.lab.sandbox.backends import (
    ENVIRONMENT,
    Limits,
    SandboxBackend,
    SupervisorCommand,
    Unsandboxed,
    backend_candidates,
    script_text,
    temporary_uids,
)

DEFAULT_LIMITS = Limits()
PROBE_LIMITS = Limits(cpu_seconds=2, wall_seconds=10.0)
STARTUP_SECONDS = 20.0  # allowance for the supervisor before and after its program
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class ExecutionResult:
    """``reason`` is one short printable line, such as "AssertionError()"; empty when passed."""

    status: Literal["passed", "failed", "timeout"]
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_program(
    program: str, tests: str = "", *, limits: Limits = DEFAULT_LIMITS, trust: bool = False
) -> ExecutionResult:
    """Runs ``program``, a complete Python source, then ``tests``; both must reach their end.

    The tests run in another process, where the names that they use and do not define are those of
    the program. Only plain data crosses, so the program cannot change what a test compares. An
    early exit with any status fails. Results are cached, since policies often write the same
    program. Raises TaskError if no sandbox works and ``trust`` is false.
    """
    return _run_cached(require_backend(trust), program, tests, limits)


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
        " install bubblewrap, allow user namespaces, run as another user than root, or set `trust`"
    )


@cache
def _backend_problem(backend: SandboxBackend) -> str | None:
    """Why a backend does not work, or None: it must run a program and prevent what that tries."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            os.chmod(file.name, 0o644)
            tests = f"check_promises({file.name!r}, {PROBE_LIMITS.memory})"
            result = _run_in(backend, script_text("probe"), tests, PROBE_LIMITS)
    except CoterieError as error:
        return str(error)
    except OSError as error:  # started by another user without access to the interpreter
        return f"a user without rights cannot start it ({error.strerror})"
    return None if result.passed else f"its probe ends with {result.reason}"


@lru_cache(maxsize=4096)
def _run_cached(
    backend: SandboxBackend, program: str, tests: str, limits: Limits
) -> ExecutionResult:
    return _run_in(backend, program, tests, limits)


def _run_in(
    backend: SandboxBackend, program: str, tests: str = "", limits: Limits = DEFAULT_LIMITS
) -> ExecutionResult:
    """Retries when the sandbox, not the program, failed to start."""
    error_line = ""
    for _ in range(MAX_ATTEMPTS):
        with backend.supervisor_command(limits) as command:
            sources = [source.encode("utf-8", "replace").decode() for source in (program, tests)]
            dumps = [marshal.dumps(_make_request(command, sources[0], limits))]
            dumps += [marshal.dumps(sources[1])]
            started, result, error_line = _run_supervisor(command, dumps, limits.wall_seconds)
        if started:
            return result
    raise TaskError(f"the sandbox does not start: {error_line or 'no error message'}")


def _run_supervisor(
    command: SupervisorCommand, messages: Sequence[bytes], seconds: float
) -> tuple[bool, ExecutionResult, str]:
    """Whether the program started, its result, and the last line on the supervisor's stderr."""
    process = subprocess.Popen(
        command.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=command.inherited_fds,
        cwd="/",
        env=ENVIRONMENT,
        start_new_session=True,
        user=command.uid,
        group=command.uid,
        extra_groups=None if command.uid is None else [],
    )
    with process:
        try:
            stdin = b"".join(len(each).to_bytes(8, "big") + each for each in messages)
            reply, stderr = process.communicate(stdin, timeout=seconds + STARTUP_SECONDS)
        except subprocess.TimeoutExpired:
            raise TaskError("the sandbox does not answer") from None
        finally:
            if process.returncode is None:  # it leads a session, with all that it started
                os.killpg(process.pid, signal.SIGKILL)
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
    """The supervisor's request. Each run has fresh users, of the program and of the tests."""
    return {
        "program": program,
        "folder": command.folder,
        "uids": temporary_uids(2) if command.separate_users else [0, 0],
        "separate_users": command.separate_users,
        "own_pid_namespace": command.own_pid_namespace,
        "wall_seconds": limits.wall_seconds,
        "cpu_seconds": limits.cpu_seconds,
        "memory": limits.memory,
        "output": limits.output,
        "limits": [
            ("RLIMIT_CPU", limits.cpu_seconds, limits.cpu_seconds + 1),
            ("RLIMIT_AS", limits.memory, limits.memory),
            ("RLIMIT_FSIZE", limits.disk, limits.disk),
            # Where all are one user, the process of the tests counts too.
            ("RLIMIT_NPROC", limits.processes + 1, limits.processes + 1),
            ("RLIMIT_NOFILE", limits.files, limits.files),
            ("RLIMIT_CORE", 0, 0),
        ],
    }
