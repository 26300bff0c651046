"""A seccomp filter for system calls that reach out of a namespace and that no program needs."""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

from coterie.errors import TaskError

AF_UNIX = 1  # the only socket family that cannot leave the network namespace
CLONE_NEW_FLAGS = 0x7E020000  # CLONE_NEW*: a new namespace would restore denied rights
F_SETPIPE_SZ = 1031  # a larger pipe

BPF_LOAD, BPF_RETURN = 0x20, 0x06
BPF_JUMP_EQUAL, BPF_JUMP_GREATER_EQUAL, BPF_JUMP_ANY_BIT = 0x15, 0x35, 0x45
SYSCALL_OFFSET, ARCH_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16  # offsets into seccomp_data
SECCOMP_ALLOW, SECCOMP_ERRNO, SECCOMP_KILL = 0x7FFF0000, 0x00050000, 0x80000000


@dataclass(frozen=True)
class SyscallTable:
    """An architecture's audit number and its numbers of the filtered system calls."""

    audit_arch: int
    clone: int
    fcntl: int
    socket: int
    denied: tuple[int, ...]


# Equal on both: io_uring, the new mount calls, pidfd_getfd, mount_setattr, memfd_secret, ...
COMMON_DENIED = (*range(425, 434), 438, 442, 447, 467)
CLONE3 = 435
SYSCALL_TABLES = {
    "x86_64": SyscallTable(
        audit_arch=0xC000003E,
        clone=56,
        fcntl=72,
        socket=41,
        denied=(
            *(101, 165, 166, 155, 161, 272, 308),  # ptrace, mounts, chroot, unshare, setns
            *(319, 29, 64, 68, 240),  # memory that belongs to no process: memfd, shm, sem, msg, mq
            *(248, 249, 250, 310, 311, 312),  # keyrings, other processes' memory
            *(321, 298, 323, 300, 303, 304),  # bpf, perf, userfaultfd, fanotify, handles
            # Kernel memory beyond the default buffers: vmsplice, bind, listen, setsockopt; quota.
            *(278, 49, 50, 54, 179),
        ),
    ),
    "aarch64": SyscallTable(
        audit_arch=0xC00000B7,
        clone=220,
        fcntl=25,
        socket=198,
        denied=(
            *(117, 40, 39, 41, 51, 97, 268),
            *(279, 194, 190, 186, 180),
            *(217, 218, 219, 270, 271, 272),
            *(280, 241, 282, 262, 264, 265),
            *(75, 200, 201, 208, 60, 116),
        ),
    ),
}


def seccomp_filter(machine: str = "") -> bytes:
    """The BPF program for ``machine`` (default: this one); TaskError for an unknown architecture.

    Denied calls return EPERM. clone3 returns ENOSYS, because a filter cannot read its flags; the C
    library then falls back to clone.
    """
    machine = machine or platform.machine()
    if machine not in SYSCALL_TABLES:
        raise TaskError(f"no filter of system calls for {machine}")
    table = SYSCALL_TABLES[machine]
    deny, not_implemented = SECCOMP_ERRNO | errno.EPERM, SECCOMP_ERRNO | errno.ENOSYS
    instructions = [
        _instruction(BPF_LOAD, ARCH_OFFSET),
        _instruction(BPF_JUMP_EQUAL, table.audit_arch, then=1),
        _instruction(BPF_RETURN, SECCOMP_KILL),
        _instruction(BPF_LOAD, SYSCALL_OFFSET),
        # x32 has other numbers for the same calls.
        *_return_if(BPF_JUMP_GREATER_EQUAL, 0x40000000, deny),
        *_return_if(BPF_JUMP_EQUAL, CLONE3, not_implemented),
        *(
            instruction
            for number in (*table.denied, *COMMON_DENIED)
            for instruction in _return_if(BPF_JUMP_EQUAL, number, deny)
        ),
        *_return_by_argument(table.clone, 0, (BPF_JUMP_ANY_BIT, CLONE_NEW_FLAGS), deny),
        *_return_by_argument(table.fcntl, 1, (BPF_JUMP_EQUAL, F_SETPIPE_SZ), deny),
        *_return_by_argument(table.socket, 0, (BPF_JUMP_EQUAL, AF_UNIX), SECCOMP_ALLOW, deny),
        _instruction(BPF_RETURN, SECCOMP_ALLOW),
    ]
    return b"".join(instructions)


def _return_if(test: int, value: int, action: int) -> list[bytes]:
    return [_instruction(test, value, otherwise=1), _instruction(BPF_RETURN, action)]


def _return_by_argument(
    call: int,
    argument: int,
    test: tuple[int, int],
    then: int,
    otherwise: int = SECCOMP_ALLOW,
) -> list[bytes]:
    """Decides ``call`` by the low 32 bits of an argument, counted from 0."""
    return [
        _instruction(BPF_JUMP_EQUAL, call, otherwise=4),
        _instruction(BPF_LOAD, ARGUMENTS_OFFSET + 8 * argument),
        *_return_if(*test, then),
        _instruction(BPF_RETURN, otherwise),
    ]


def _instruction(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
