"""A program that tries what a sandbox must prevent. It runs as text, before any other program."""

import os
import socket
from collections.abc import Iterable, Iterator


def check_promises(host_file: str, memory: int) -> None:
    """Raises a RuntimeError that names everything that succeeds."""
    attempts = {
        "reads a file of the machine": lambda: open(host_file).close(),
        "reads or writes a file of the kernel": lambda: _open_any(_kernel_files()),
        "writes into the system": lambda: _open_any(("/x", "/usr/x"), os.O_CREAT),
        "opens a network socket": lambda: socket.socket(socket.AF_INET),
        "becomes root": lambda: os.setuid(0),
        "takes memory beyond its limit": lambda: bytearray(memory + 1),
        "enlarges a buffer of the kernel": _enlarge_buffer,
    }
    succeeded = [name for name, attempt in attempts.items() if _succeeds(attempt)]
    if succeeded:
        raise RuntimeError(f"a program {', '.join(succeeded)}")


def _succeeds(attempt) -> bool:
    try:
        attempt()
    except (OSError, MemoryError):
        return False
    return True


def _kernel_files() -> Iterator[str]:
    """All files of /proc but those of processes."""
    for entry in os.scandir("/proc"):
        if not entry.is_symlink() and not entry.name.isdecimal():
            if entry.is_file():
                yield entry.path
            for folder, _, files in os.walk(entry.path):
                yield from (f"{folder}/{name}" for name in files)


def _open_any(paths: Iterable[str], flags: int = os.O_NONBLOCK) -> None:
    """Opens the first file that can be read or written; else a PermissionError."""
    for path in paths:
        for mode in (os.O_RDONLY, os.O_WRONLY):
            try:
                return os.close(os.open(path, mode | flags))
            except OSError:
                continue
    raise PermissionError


def _enlarge_buffer() -> None:
    left, _ = socket.socketpair()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
