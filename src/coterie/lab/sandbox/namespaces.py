"""Builds a sandbox from Linux namespaces, then runs the supervisor inside it.

Python has no functions for mounts, so it makes the system calls through libc. Its first argument is
the marshalled plan.
"""

import ctypes
import marshal
import os
import struct
import sys

from coterie.lab.sandbox.supervisor import main as supervise

CLONE_NEWUSER = 0x10000000
CLONE_OTHER_NAMESPACES = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is the same everywhere
MOUNT_ATTR_RDONLY_NOSUID = 1 | 2
PR_SET_PDEATHSIG, PR_CAPBSET_READ, PR_CAPBSET_DROP = 1, 23, 24
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
CAPABILITY_VERSION = 0x20080522
INNER_UID = 1000  # the user inside, where the caller is not root
LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    plan = marshal.loads(bytes.fromhex(sys.argv[1]))
    _check(LIBC.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl")
    _unshare(plan["separate_users"])
    child = os.fork()
    if child == 0:
        _check(LIBC.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl")
        _enter_root(plan)
        _drop_privileges(plan)
        supervise()
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _unshare(separate_users: bool) -> None:
    """Enters new namespaces; without root, inside a user namespace that maps one user."""
    if separate_users:
        return _check(LIBC.unshare(CLONE_OTHER_NAMESPACES), "unshare")
    user, group = os.geteuid(), os.getegid()
    _check(LIBC.unshare(CLONE_NEWUSER | CLONE_OTHER_NAMESPACES), "unshare")
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{INNER_UID} {user} 1"),
        ("gid_map", f"{INNER_UID} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)


def _enter_root(plan: dict) -> None:
    """Switches to a new root with the plan's paths, read-only, and a private /tmp."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _check(LIBC.pivot_root(b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path in plan["visible_paths"]:
        _bind_read_only(path, MS_BIND | MS_REC)
    for path, target in plan["symlinks"]:
        os.symlink(target, f"/new{path}")
    for path in plan["devices"]:
        _make_mount_point(path, folder=False)
    for name in ("proc", "tmp"):
        os.mkdir(f"/new/{name}", 0o755)
    # The inherited umask may be tight; another user must be able to enter these folders.
    for path in plan["parent_folders"]:
        os.chmod(f"/new{path}", 0o111)
    _make_read_only("/new")
    for path in plan["devices"]:
        _mount(f"/old{path}", f"/new{path}", None, MS_BIND)
    # Only processes: no sysctl, no keys, nothing that is writable or describes the machine.
    _mount("proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")
    _mount("tmpfs", "/new/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={plan['disk']},mode=1777")
    os.chdir("/new")
    _check(LIBC.pivot_root(b".", b"."), "pivot_root")
    _check(LIBC.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/tmp")


def _bind_read_only(path: str, flags: int) -> None:
    _make_mount_point(path, folder=os.path.isdir(f"/old{path}"))
    _mount(f"/old{path}", f"/new{path}", None, flags)


def _make_mount_point(path: str, *, folder: bool) -> None:
    os.makedirs(f"/new{path}" if folder else os.path.dirname(f"/new{path}"), 0o755, exist_ok=True)
    if not folder:
        open(f"/new{path}", "x").close()


def _make_read_only(path: str) -> None:
    values = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY_NOSUID, 0, 0, 0)
    status = LIBC.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        path.encode(),
        ctypes.c_uint(AT_RECURSIVE),
        values,
        ctypes.c_size_t(len(values)),
    )
    _check(status, "mount_setattr")


def _drop_privileges(plan: dict) -> None:
    """Keeps only the plan's capabilities and installs its seccomp filter."""
    capability = 0
    while LIBC.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        _check(LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "prctl")
        capability += 1
    mask = sum(1 << kept for kept in plan["capabilities"])
    # Effective, permitted, inheritable: the low words, then the high ones.
    header, sets = (
        struct.pack("=Ii", CAPABILITY_VERSION, 0),
        struct.pack("=6I", mask, mask, *[0] * 4),
    )
    _check(LIBC.capset(header, sets), "capset")
    _check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    instructions = plan["seccomp_filter"]
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(buffer))
    _check(LIBC.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str = ""
) -> None:
    status = LIBC.mount(
        source and source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        options.encode(),
    )
    _check(status, f"mount {target}")


def _check(status: int, operation: str) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), f"{operation}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
