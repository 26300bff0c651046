"""The system calls that no answer needs and that reach out of a namespace, as a seccomp filter."""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

AF_UNIX = 1  # the one family of sockets that ends inside the network namespace
CLONE_NEW_FLAGS = 0x7E020000  # CLONE_NEW*: a new one would give back what this one took

BPF_LOAD, BPF_JUMP_EQUAL, BPF_JUMP_GREATER_EQUAL, BPF_JUMP_ANY_BIT, BPF_RETURN = (
    0x20,
    0x15,
    0x35,
    0x45,
    0x06,
)
SYSCALL_OFFSET, ARCH_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 4, 16  # offsets into seccomp_data
SECCOMP_ALLOW, SECCOMP_ERRNO, SECCOMP_KILL = 0x7FFF0000, 0x00050000, 0x80000000


@dataclass(frozen=True)
class SyscallTable:
    """Audit number of an architecture, and its numbers of the calls that matter."""

    audit_arch: int
    clone: int
    socket: int
    denied: tuple[int, ...]


# Same on both: io_uring, the new mount calls, pidfd_getfd, mount_setattr, memfd_secret, ...
COMMON_DENIED = (*range(425, 434), 438, 442, 447, 467)
CLONE3 = 435
SYSCALL_TABLES = {
    "x86_64": SyscallTable(
        audit_arch=0xC000003E,
        clone=56,
        socket=41,
        denied=(
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
    "aarch64": SyscallTable(
        audit_arch=0xC00000B7,
        clone=220,
        socket=198,
        denied=(
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
    table = SYSCALL_TABLES.get(machine or platform.machine())
    if table is None:
        return None
    deny, not_implemented = SECCOMP_ERRNO | errno.EPERM, SECCOMP_ERRNO | errno.ENOSYS
    instructions = [
        _instruction(BPF_LOAD, ARCH_OFFSET),
        _instruction(BPF_JUMP_EQUAL, table.audit_arch, then=1),
        _instruction(BPF_RETURN, SECCOMP_KILL),
        _instruction(BPF_LOAD, SYSCALL_OFFSET),
        *_return_if(
            BPF_JUMP_GREATER_EQUAL, 0x40000000, deny
        ),  # x32, other numbers for the same calls
        *_return_if(BPF_JUMP_EQUAL, CLONE3, not_implemented),
        *(
            instruction
            for number in (*table.denied, *COMMON_DENIED)
            for instruction in _return_if(BPF_JUMP_EQUAL, number, deny)
        ),
        *_return_by_argument(
            table.clone, BPF_JUMP_ANY_BIT, CLONE_NEW_FLAGS, then=deny, otherwise=SECCOMP_ALLOW
        ),
        *_return_by_argument(
            table.socket, BPF_JUMP_EQUAL, AF_UNIX, then=SECCOMP_ALLOW, otherwise=deny
        ),
        _instruction(BPF_RETURN, SECCOMP_ALLOW),
    ]
    return b"".join(instructions)


def _return_if(test: int, value: int, action: int) -> list[bytes]:
    return [_instruction(test, value, otherwise=1), _instruction(BPF_RETURN, action)]


def _return_by_argument(
    call: int, test: int, value: int, *, then: int, otherwise: int
) -> list[bytes]:
    """What becomes of ``call`` by its first argument, of which the low 32 bits are looked at."""
    return [
        _instruction(BPF_JUMP_EQUAL, call, otherwise=4),
        _instruction(BPF_LOAD, FIRST_ARGUMENT_OFFSET),
        _instruction(test, value, otherwise=1),
        _instruction(BPF_RETURN, then),
        _instruction(BPF_RETURN, otherwise),
    ]


def _instruction(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
