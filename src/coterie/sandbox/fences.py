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

from coterie.sandbox.syscalls import seccomp_filter
from coterie.sandbox.verdict import Limits

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store")
CONFIGURED = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# What the warden keeps of root's: to give the program another user, and to see where it stands.
RIGHTS = {"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SYS_PTRACE": 19}
# All that a program sees of the environment: a fixed order of sets, so that the same program gets
# the same verdict, and where the interpreter's own libraries lie.
ENVIRONMENT = {"PYTHONHASHSEED": "0"} | {
    name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
}


@dataclass(frozen=True)
class Start:
    """A command that becomes a warden, and the file descriptors that it inherits.

    ``apart``: the warden is root and gives the program a user of its own. ``alone``: it is
    process 1 of a namespace, so that its end is the end of whatever was started there.
    """

    command: Sequence[str]
    folder: str
    apart: bool = False
    alone: bool = True
    inherited: tuple[int, ...] = ()


class Fence(Protocol):
    """One way to keep a program in."""

    @property
    def name(self) -> str: ...

    def start(self, limits: Limits) -> AbstractContextManager[Start]: ...


@dataclass(frozen=True)
class Bubblewrap:
    """``bwrap`` from ``path``; ``apart`` as in ``Start``, else one user in a user namespace."""

    path: str
    apart: bool
    name: str = "bubblewrap"

    @contextmanager
    def start(self, limits: Limits) -> Iterator[Start]:
        options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        options += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"]
        options += ["--cap-drop", "ALL"]
        if self.apart:
            options += [word for right in RIGHTS for word in ("--cap-add", right)]
        else:
            options += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        for path in above():
            options += ["--perms", "111", "--dir", path]
        for path in shown():
            options += ["--ro-bind", path, path]
        for path, aim in links():
            options += ["--symlink", aim, path]
        for path in devices():
            options += ["--dev-bind", path, path]
        options += ["--proc", "/proc", "--size", str(limits.disk), "--perms", "1777"]
        options += ["--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--clearenv"]
        for name, value in ENVIRONMENT.items():
            options += ["--setenv", name, value]
        with _piped(seccomp_filter()) as ends:
            for end in ends:
                options += ["--seccomp", str(end)]
            command = [self.path, *options, "--", *_python(_text("warden"))]
            yield Start(command, "/tmp", self.apart, inherited=ends)


@dataclass(frozen=True)
class Namespaces:
    """The same room, built with system calls of our own; ``apart`` as in ``Start``."""

    apart: bool
    name: str = "namespaces"

    @contextmanager
    def start(self, limits: Limits) -> Iterator[Start]:
        plan = {
            "apart": self.apart,
            "shown": shown(),
            "above": above(),
            "links": links(),
            "devices": devices(),
            "disk": limits.disk,
            "rights": list(RIGHTS.values()) if self.apart else [],
            "filter": seccomp_filter() or b"",
            "command": _python(_text("warden")),
            "environment": ENVIRONMENT,
        }
        command = [*_python(_text("walls")), marshal.dumps(plan).hex()]
        yield Start(command, "/tmp", self.apart)


@dataclass(frozen=True)
class Open:
    """No fence: a child with limits, in a temporary folder, that may read, write and connect."""

    name: str = "none"

    @contextmanager
    def start(self, limits: Limits) -> Iterator[Start]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield Start(_python(_text("warden")), folder, alone=False)


def candidates() -> list[Fence]:
    """Best first. Root gives a program a user of its own, where the machine has users to give."""
    found: list[Fence] = []
    if not sys.platform.startswith("linux"):
        return found
    users = (True, False) if os.geteuid() == 0 else (False,)
    if (bwrap := shutil.which("bwrap")) is not None:
        found += [Bubblewrap(bwrap, apart) for apart in users]
    return found + [Namespaces(apart) for apart in users]


@cache
def shown() -> tuple[str, ...]:
    """What is seen inside, read-only: the system, and of the interpreter's prefix what it runs."""
    prefix = Path(sys.base_prefix).resolve()
    interpreter = [prefix / part for part in ("bin", "lib", "lib64")]
    paths = [Path(path) for path in SYSTEM] + interpreter + [Path(path) for path in CONFIGURED]
    taken: list[Path] = []
    for path in paths:
        if path.exists() and not path.is_symlink() and not any(map(path.is_relative_to, taken)):
            taken.append(path)
    return tuple(map(str, taken))


@cache
def links() -> tuple[tuple[str, str], ...]:
    """Folders of the system that are links: "/lib" to "usr/lib"."""
    return tuple((path, os.readlink(path)) for path in SYSTEM if os.path.islink(path))


def above() -> list[str]:
    """The folders on the way to all that is there, highest first.

    To pass through, not to look around in: the interpreter may lie in somebody's home.
    """
    parents = {str(parent) for path in (*shown(), *devices()) for parent in Path(path).parents}
    return sorted(parents - {"/"})


@cache
def devices() -> tuple[str, ...]:
    return tuple(path for path in DEVICES if os.path.exists(path))


def _python(text: str) -> list[str]:
    """The interpreter without site packages or a path of ours, with ``text`` to run."""
    interpreter = getattr(sys, "_base_executable", sys.executable)
    return [os.path.realpath(interpreter), "-P", "-s", "-S", "-B", "-c", text]


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


@contextmanager
def _piped(content: bytes | None) -> Iterator[tuple[int, ...]]:
    """A descriptor that gives ``content`` (less than a pipe holds), or none for None."""
    if content is None:
        yield ()
        return
    reading, writing = os.pipe()
    try:
        os.write(writing, content)
        os.close(writing)
        yield (reading,)
    finally:
        os.close(reading)
