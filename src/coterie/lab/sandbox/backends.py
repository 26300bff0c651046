"""Sandbox backends: each starts a supervisor, in bubblewrap, in plain namespaces or unsandboxed."""

from __future__ import annotations

import marshal
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Annotated

from coterie.keys import Key
from coterie.lab.sandbox.syscalls import seccomp_filter

SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store")
CONFIG_PATHS = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICE_PATHS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Loads compiled modules, the last one as the main program.
LOADER = """
import marshal, sys
for name, code in marshal.loads(bytes.fromhex(sys.argv.pop(1))):
    exec(code, vars(sys.modules.setdefault(name, type(sys)(name))))
"""
SETGID, SETUID = 6, 7  # root's capabilities that the supervisor keeps
TEMPORARY_UIDS = range(61184, 65520)  # ids that systems reserve for transient users
# A program's whole environment. A fixed hash seed makes results repeatable; the interpreter may
# need its library path.
ENVIRONMENT = {"PYTHONHASHSEED": "0"} | {
    name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
}


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program, its child processes included.

    ``cpu_seconds`` is processor time, so that load on the machine fails no program.
    ``wall_seconds`` also ends a program that sleeps. ``memory`` limits the address space of each
    process and the resident memory of all of them. ``disk`` limits the private folder and each
    file; ``output`` limits stdout and stderr. These three are in bytes.
    """

    cpu_seconds: Annotated[int, Key("processor")] = 5
    wall_seconds: Annotated[float, Key("seconds")] = 20.0
    memory: Annotated[int, Key("memory")] = 1 << 30
    disk: Annotated[int, Key("disk")] = 8 << 20
    output: Annotated[int, Key("output")] = 16 << 20
    processes: Annotated[int, Key("processes")] = 8
    files: Annotated[int, Key("files")] = 32


@dataclass(frozen=True)
class SupervisorCommand:
    """The command line of a supervisor, and how it is started.

    It runs as user ``uid`` (None: ours). With ``separate_users`` it is root and runs the program
    and the tests as other users. With ``own_pid_namespace`` it is process 1 of a namespace: when it
    ends, the kernel kills every process in it.
    """

    command: Sequence[str]
    folder: str
    uid: int | None = None
    separate_users: bool = False
    own_pid_namespace: bool = True
    inherited_fds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bubblewrap:
    """bubblewrap with a user namespace that maps one user, never the machine's root."""

    path: str
    name: str = "bubblewrap"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        options = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
        options += ["--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session"]
        options += ["--as-pid-1", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000"]
        for path in parent_folders():
            options += ["--perms", "111", "--dir", path]
        for path in visible_paths():
            options += ["--ro-bind", path, path]
        for path, target in symlinks():
            options += ["--symlink", target, path]
        for path in available_devices():
            options += ["--dev-bind", path, path]
        options += ["--proc", "/proc", *_proc_covers(), "--size", str(limits.disk)]
        options += ["--perms", "1777", "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
        options += ["--clearenv"]
        for name, value in ENVIRONMENT.items():
            options += ["--setenv", name, value]
        python = python_command("remote_calls", "supervisor")
        with _pipe_with(seccomp_filter()) as fd:
            command = [self.path, *options, "--seccomp", str(fd), "--", *python]
            yield SupervisorCommand(command, "/tmp", _unprivileged_uid(), inherited_fds=(fd,))


@dataclass(frozen=True)
class Namespaces:
    """The same isolation by direct system calls, where bubblewrap is missing.

    ``separate_users`` needs root and no user namespace.
    """

    separate_users: bool
    name: str = "namespaces"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        plan = {
            "separate_users": self.separate_users,
            "visible_paths": visible_paths(),
            "parent_folders": parent_folders(),
            "symlinks": symlinks(),
            "devices": available_devices(),
            "disk": limits.disk,
            "capabilities": [SETGID, SETUID] if self.separate_users else [],
            "seccomp_filter": seccomp_filter(),
        }
        python = python_command("remote_calls", "supervisor", "namespaces")
        command = [*python, marshal.dumps(plan).hex()]
        uid = None if self.separate_users else _unprivileged_uid()
        yield SupervisorCommand(command, "/tmp", uid, self.separate_users)


@dataclass(frozen=True)
class Unsandboxed:
    """No isolation: a child process with limits and all permissions of its user."""

    name: str = "none"

    @contextmanager
    def supervisor_command(self, limits: Limits) -> Iterator[SupervisorCommand]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield SupervisorCommand(
                python_command("remote_calls", "supervisor"), folder, own_pid_namespace=False
            )


SandboxBackend = Bubblewrap | Namespaces | Unsandboxed
"""A way to isolate a program."""


def backend_candidates() -> list[SandboxBackend]:
    """Backends for this system, best first."""
    if not sys.platform.startswith("linux"):
        return []
    bwrap = shutil.which("bwrap")
    bubblewrap: list[SandboxBackend] = [] if bwrap is None else [Bubblewrap(bwrap)]
    separate_users = (True, False) if os.geteuid() == 0 else (False,)
    return bubblewrap + [Namespaces(separate) for separate in separate_users]


def temporary_uids(count: int) -> list[int]:
    """Different users for one run: some limits count per user."""
    return random.SystemRandom().sample(TEMPORARY_UIDS, count)


def _unprivileged_uid() -> int | None:
    """The user that enters a user namespace: ours, or a temporary one if we are root."""
    return temporary_uids(1)[0] if os.geteuid() == 0 else None


@cache
def visible_paths() -> tuple[str, ...]:
    """Paths that a program can read: system libraries and the interpreter."""
    prefix = Path(sys.base_prefix).resolve()
    interpreter = [prefix / part for part in ("bin", "lib", "lib64")]
    visible: list[Path] = []
    for path in (*map(Path, SYSTEM_PATHS), *interpreter, *map(Path, CONFIG_PATHS)):
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


def python_command(*modules: str) -> list[str]:
    """Runs the last of these modules of our folder in the base interpreter, without site packages.

    It gets compiled modules, which load fast: a virtual environment has its base's version.
    """
    interpreter = getattr(sys, "_base_executable", sys.executable)
    names = [*(f"{__package__}.{module}" for module in modules[:-1]), "__main__"]
    code = marshal.dumps(list(zip(names, map(script_code, modules), strict=True)))
    command = [os.path.realpath(interpreter), "-P", "-s", "-S", "-B"]
    return [*command, "-c", LOADER, code.hex()]


@cache
def script_text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


@cache
def script_code(name: str) -> CodeType:
    return compile(script_text(name), name, "exec")


def _proc_covers() -> Iterator[str]:
    """Options that hide all of /proc but the processes: bubblewrap cannot mount it without."""
    for entry in os.scandir("/proc"):
        if entry.is_symlink() or entry.name.isdecimal():
            continue
        if entry.is_dir():
            yield from ("--perms", "555", "--tmpfs", entry.path, "--remount-ro", entry.path)
        else:
            yield from ("--ro-bind", "/dev/null", entry.path)


@contextmanager
def _pipe_with(content: bytes) -> Iterator[int]:
    """Yields the read end of a pipe that holds ``content``, at most a pipe's buffer."""
    read_fd, write_fd = os.pipe()
    try:
        os.write(write_fd, content)
        os.close(write_fd)
        yield read_fd
    finally:
        os.close(read_fd)
