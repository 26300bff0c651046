"""Sandbox backends: each starts a supervisor, in bubblewrap, in plain namespaces or unsandboxed."""

from __future__ import annotations

import marshal
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from coterie.lab.sandbox.result import Limits
from coterie.lab.sandbox.syscalls import seccomp_filter

SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store")
CONFIG_PATHS = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICE_PATHS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Root's capabilities that the supervisor keeps: change the program's user, read its stack pointer.
CAPABILITIES = {"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SYS_PTRACE": 19}
# A program's whole environment. A fixed hash seed makes results repeatable; the interpreter may
# need its library path.
ENVIRONMENT = {"PYTHONHASHSEED": "0"} | {
    name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
}


@dataclass(frozen=True)
class SupervisorCommand:
    """The command line of a supervisor, and the file descriptors that it inherits.

    With ``separate_user`` the supervisor is root and runs the program as another user. With
    ``own_pid_namespace`` it is process 1 of a namespace: when it ends, the kernel kills every
    process in it.
    """

    command: Sequence[str]
    folder: str
    separate_user: bool = False
    own_pid_namespace: bool = True
    inherited_fds: tuple[int, ...] = ()


class SandboxBackend(Protocol):
    """A way to isolate a program (protocol)."""

    @property
    def name(self) -> str: ...

    def supervisor_command(self, limits: Limits) -> AbstractContextManager[SupervisorCommand]: ...


@dataclass(frozen=True)
class Bubblewrap:
    """bubblewrap; without ``separate_user`` it maps one user in a user namespace."""

    path: str
    separate_user: bool
    name: str = "bubblewrap"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        options += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"]
        options += ["--cap-drop", "ALL"]
        if self.separate_user:
            options += [part for name in CAPABILITIES for part in ("--cap-add", name)]
        else:
            options += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        for path in parent_folders():
            options += ["--perms", "111", "--dir", path]
        for path in visible_paths():
            options += ["--ro-bind", path, path]
        for path, target in symlinks():
            options += ["--symlink", target, path]
        for path in available_devices():
            options += ["--dev-bind", path, path]
        options += ["--proc", "/proc", "--size", str(limits.disk), "--perms", "1777"]
        options += ["--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--clearenv"]
        for name, value in ENVIRONMENT.items():
            options += ["--setenv", name, value]
        with _pipe_with(seccomp_filter()) as fds:
            for fd in fds:
                options += ["--seccomp", str(fd)]
            command = [self.path, *options, "--", *_python_command(_script_text("supervisor"))]
            yield SupervisorCommand(command, "/tmp", self.separate_user, inherited_fds=fds)


@dataclass(frozen=True)
class Namespaces:
    """The same isolation by direct system calls, where bubblewrap is missing."""

    separate_user: bool
    name: str = "namespaces"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        plan = {
            "separate_user": self.separate_user,
            "visible_paths": visible_paths(),
            "parent_folders": parent_folders(),
            "symlinks": symlinks(),
            "devices": available_devices(),
            "disk": limits.disk,
            "capabilities": list(CAPABILITIES.values()) if self.separate_user else [],
            "seccomp_filter": seccomp_filter() or b"",
            "command": _python_command(_script_text("supervisor")),
            "environment": ENVIRONMENT,
        }
        command = [*_python_command(_script_text("namespaces")), marshal.dumps(plan).hex()]
        yield SupervisorCommand(command, "/tmp", self.separate_user)


@dataclass(frozen=True)
class Unsandboxed:
    """No isolation: a child process with limits and all permissions of its user."""

    name: str = "none"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield SupervisorCommand(
                _python_command(_script_text("supervisor")), folder, own_pid_namespace=False
            )


def backend_candidates() -> list[SandboxBackend]:
    """Backends for this system, best first; as root, those with a separate user come first."""
    backends: list[SandboxBackend] = []
    if not sys.platform.startswith("linux"):
        return backends
    separate_users = (True, False) if os.geteuid() == 0 else (False,)
    if (bwrap := shutil.which("bwrap")) is not None:
        backends += [Bubblewrap(bwrap, separate_user) for separate_user in separate_users]
    return backends + [Namespaces(separate_user) for separate_user in separate_users]


@cache
def visible_paths() -> tuple[str, ...]:
    """Paths that a program can read: system libraries and the interpreter."""
    prefix = Path(sys.base_prefix).resolve()
    interpreter = [prefix / part for part in ("bin", "lib", "lib64")]
    paths = (
        [Path(path) for path in SYSTEM_PATHS] + interpreter + [Path(path) for path in CONFIG_PATHS]
    )
    visible: list[Path] = []
    for path in paths:
        if path.exists() and not path.is_symlink() and not any(map(path.is_relative_to, visible)):
            visible.append(path)
    return tuple(map(str, visible))


@cache
def symlinks() -> tuple[tuple[str, str], ...]:
    """System folders that are symbolic links, with their targets: ("/lib", "usr/lib")."""
    return tuple((path, os.readlink(path)) for path in SYSTEM_PATHS if os.path.islink(path))


def parent_folders() -> list[str]:
    """The parent folders of all visible paths, outermost first.

    A program can enter them and cannot list them: the interpreter may lie in a home folder.
    """
    paths = (*visible_paths(), *available_devices())
    return sorted({str(parent) for path in paths for parent in Path(path).parents} - {"/"})


@cache
def available_devices() -> tuple[str, ...]:
    return tuple(path for path in DEVICE_PATHS if os.path.exists(path))


def _python_command(code: str) -> list[str]:
    """Runs ``code`` in the base interpreter, without site packages or our import path."""
    interpreter = getattr(sys, "_base_executable", sys.executable)
    return [os.path.realpath(interpreter), "-P", "-s", "-S", "-B", "-c", code]


@cache
def _script_text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


@contextmanager
def _pipe_with(content: bytes | None) -> Iterator[tuple[int, ...]]:
    """Yields the read end of a pipe that holds ``content`` (at most a pipe's buffer), if any."""
    if content is None:
        yield ()
        return
    read_fd, write_fd = os.pipe()
    try:
        os.write(write_fd, content)
        os.close(write_fd)
        yield (read_fd,)
    finally:
        os.close(read_fd)
