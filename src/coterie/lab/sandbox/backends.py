"""The ways to start a warden: inside bubblewrap, inside namespaces of our own, or in the open."""

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
# What the warden keeps of root's: to give the program another user, and to see where it stands.
CAPABILITIES = {"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SYS_PTRACE": 19}
# All that a program sees of the environment: a fixed order of sets, so that the same program gets
# the same verdict, and where the interpreter's own libraries lie.
ENVIRONMENT = {"PYTHONHASHSEED": "0"} | {
    name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
}


@dataclass(frozen=True)
class SupervisorCommand:
    """A command that becomes a warden, and the file descriptors that it inherits.

    ``apart``: the warden is root and gives the program a user of its own. ``alone``: it is
    process 1 of a namespace, so that its end is the end of whatever was started there.
    """

    command: Sequence[str]
    folder: str
    separate_user: bool = False
    own_pid_namespace: bool = True
    inherited_fds: tuple[int, ...] = ()


class SandboxBackend(Protocol):
    """One way to keep a program in."""

    @property
    def name(self) -> str: ...

    def supervisor_command(self, limits: Limits) -> AbstractContextManager[SupervisorCommand]: ...


@dataclass(frozen=True)
class Bubblewrap:
    """``bwrap`` from ``path``; ``apart`` as in ``Start``, else one user in a user namespace."""

    path: str
    separate_user: bool
    name: str = "bubblewrap"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        options += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"]
        options += ["--cap-drop", "ALL"]
        if self.separate_user:
            options += [word for capability in CAPABILITIES for word in ("--cap-add", capability)]
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
    """The same room, built with system calls of our own; ``apart`` as in ``Start``."""

    separate_user: bool
    name: str = "namespaces"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        plan = {
            "apart": self.separate_user,
            "shown": visible_paths(),
            "above": parent_folders(),
            "links": symlinks(),
            "devices": available_devices(),
            "disk": limits.disk,
            "rights": list(CAPABILITIES.values()) if self.separate_user else [],
            "filter": seccomp_filter() or b"",
            "command": _python_command(_script_text("supervisor")),
            "environment": ENVIRONMENT,
        }
        command = [*_python_command(_script_text("namespaces")), marshal.dumps(plan).hex()]
        yield SupervisorCommand(command, "/tmp", self.separate_user)


@dataclass(frozen=True)
class Unsandboxed:
    """No fence: a child with limits, in a temporary folder, that may read, write and connect."""

    name: str = "none"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield SupervisorCommand(
                _python_command(_script_text("supervisor")), folder, own_pid_namespace=False
            )


def backend_candidates() -> list[SandboxBackend]:
    """Best first. Root gives a program a user of its own, where the machine has users to give."""
    backends: list[SandboxBackend] = []
    if not sys.platform.startswith("linux"):
        return backends
    separate_users = (True, False) if os.geteuid() == 0 else (False,)
    if (bwrap := shutil.which("bwrap")) is not None:
        backends += [Bubblewrap(bwrap, separate_user) for separate_user in separate_users]
    return backends + [Namespaces(separate_user) for separate_user in separate_users]


@cache
def visible_paths() -> tuple[str, ...]:
    """What is seen inside, read-only: the system, and of the interpreter's prefix what it runs."""
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
    """Folders of the system that are links: "/lib" to "usr/lib"."""
    return tuple((path, os.readlink(path)) for path in SYSTEM_PATHS if os.path.islink(path))


def parent_folders() -> list[str]:
    """The folders on the way to all that is there, highest first.

    To pass through, not to look around in: the interpreter may lie in somebody's home.
    """
    parents = {
        str(parent)
        for path in (*visible_paths(), *available_devices())
        for parent in Path(path).parents
    }
    return sorted(parents - {"/"})


@cache
def available_devices() -> tuple[str, ...]:
    return tuple(path for path in DEVICE_PATHS if os.path.exists(path))


def _python_command(code: str) -> list[str]:
    """The interpreter without site packages or a path of ours, with ``text`` to run."""
    interpreter = getattr(sys, "_base_executable", sys.executable)
    return [os.path.realpath(interpreter), "-P", "-s", "-S", "-B", "-c", code]


@cache
def _script_text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


@contextmanager
def _pipe_with(content: bytes | None) -> Iterator[tuple[int, ...]]:
    """A descriptor that gives ``content`` (less than a pipe holds), or none for None."""
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
