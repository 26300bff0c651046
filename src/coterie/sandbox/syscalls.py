"""The system calls that no answer needs and that reach out of a namespace, as a seccomp filter."""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

UNIX = 1  # the one family of sockets that ends inside the network namespace
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*: a new one would give back what this one took

LOAD, EQUAL, ABOVE, ANY, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, MACHINE, FIRST = 0, 4, 16  # offsets into seccomp_data
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000


@dataclass(frozen=True)
class Machine:
    """Audit number of an architecture, and its numbers of the calls that matter."""

    audit: int
    clone: int
    socket: int
    refused: tuple[int, ...]


# Same on both: io_uring, the new mount calls, pidfd_getfd, mount_setattr, memfd_secret, ...
COMMON = (*range(425, 434), 438, 442, 447, 467)
CLONE3 = 435
MACHINES = {
    "x86_64": Machine(
        audit=0xC000003E,
        clone=56,
        socket=41,
        refused=(
            *(101, 165, 166, 155, 161, 272, 308),  # ptrace, mounts, chroot, unshare, setns
            *(319, 29, 64, 68, 240),  # memory that belongs to no process: memfd, shm, sem, msg, mq
            *(248, 249, 250, 310, 311, 312),  # keyrings, other processes' memory
            *(
                321,
                298,
                323,
                300,
                303,
                304,
                179,
            ),  # bpf, perf, userfaultfd, fanotify, handles, quota
        ),
    ),
    "aarch64": Machine(
        audit=0xC00000B7,
        clone=220,
        socket=198,
        refused=(
            *(117, 40, 39, 41, 51, 97, 268),
            *(279, 194, 190, 186, 180),
            *(217, 218, 219, 270, 271, 272),
            *(280, 241, 282, 262, 264, 265),
            *(60, 116),
        ),
    ),
}


def seccomp_filter(machine: str = "") -> bytes | None:
    """A BPF program for this machine (or the one named), or None where its numbers are unknown.

    Refused calls fail as forbidden; clone3 as unknown, for its flags lie where no filter looks
    and the C library then falls back to clone.
    """
    known = MACHINES.get(machine or platform.machine())
    if known is None:
        return None
    refuse, unknown = REFUSE | errno.EPERM, REFUSE | errno.ENOSYS
    lines = [
        _line(LOAD, MACHINE),
        _line(EQUAL, known.audit, then=1),
        _line(RETURN, KILL),
        _line(LOAD, NUMBER),
        *_when(ABOVE, 0x40000000, refuse),  # x32, other numbers for the same calls
        *_when(EQUAL, CLONE3, unknown),
        *(line for call in (*known.refused, *COMMON) for line in _when(EQUAL, call, refuse)),
        *_when_argument(known.clone, ANY, NEW_NAMESPACES, then=refuse, otherwise=ALLOW),
        *_when_argument(known.socket, EQUAL, UNIX, then=ALLOW, otherwise=refuse),
        _line(RETURN, ALLOW),
    ]
    return b"".join(lines)


def _when(test: int, value: int, verdict: int) -> list[bytes]:
    return [_line(test, value, otherwise=1), _line(RETURN, verdict)]


def _when_argument(call: int, test: int, value: int, *, then: int, otherwise: int) -> list[bytes]:
    """What becomes of ``call`` by its first argument, of which the low 32 bits are looked at."""
    return [
        _line(EQUAL, call, otherwise=4),
        _line(LOAD, FIRST),
        _line(test, value, otherwise=1),
        _line(RETURN, then),
        _line(RETURN, otherwise),
    ]


def _line(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
