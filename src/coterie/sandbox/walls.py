"""Makes a sandbox out of namespaces alone and becomes, inside it, the program that it is told.

It runs as text (``python -c``), with the standard library only: mounts need system calls that
Python has no functions for. The plan in its first argument says what is to be seen inside.
"""

import ctypes
import marshal
import os
import struct
import sys

NEW_USER = 0x10000000
NEW_OTHERS = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is the same everywhere
READ_ONLY_NOSUID = 1 | 2
DIE_WITH_PARENT, DROP_BOUND, NO_NEW_RIGHTS, SECCOMP = 1, 24, 38, 22
INSIDE = 1000  # the user that one sees inside who came without rights
LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    plan = marshal.loads(bytes.fromhex(sys.argv[1]))
    _check(LIBC.prctl(DIE_WITH_PARENT, 9, 0, 0, 0), "prctl")
    _unshare(plan["apart"])
    child = os.fork()
    if child == 0:
        _check(LIBC.prctl(DIE_WITH_PARENT, 9, 0, 0, 0), "prctl")
        _enter_room(plan)
        _shed_rights(plan)
        os.execve(plan["command"][0], plan["command"], plan["environment"])
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _unshare(apart: bool) -> None:
    """Own namespaces: as root those alone, otherwise inside a user namespace of one user."""
    if apart:
        return _check(LIBC.unshare(NEW_OTHERS), "unshare")
    user, group = os.geteuid(), os.getegid()
    _check(LIBC.unshare(NEW_USER | NEW_OTHERS), "unshare")
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE} {user} 1"),
        ("gid_map", f"{INSIDE} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)


def _enter_room(plan: dict) -> None:
    """An own root that holds what the plan shows, all of it read-only, and a private /tmp."""
    _mount(None, "/", None, REC | PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _check(LIBC.pivot_root(b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", NOSUID, "size=1m,mode=755")
    for path in plan["shown"]:
        _show(path, BIND | REC)
    for path, aim in plan["links"]:
        os.symlink(aim, f"/new{path}")
    for path in plan["devices"]:
        _place(path, folder=False)
    for name in ("proc", "tmp"):
        os.mkdir(f"/new/{name}", 0o755)
    for path in plan["above"]:
        os.chmod(f"/new{path}", 0o111)  # whatever mask we inherit: others must pass
    _make_read_only("/new")
    for path in plan["devices"]:
        _mount(f"/old{path}", f"/new{path}", None, BIND)
    _mount("proc", "/new/proc", "proc", NOSUID | NODEV | NOEXEC)
    _mount("tmpfs", "/new/tmp", "tmpfs", NOSUID | NODEV, f"size={plan['disk']},mode=1777")
    os.chdir("/new")
    _check(LIBC.pivot_root(b".", b"."), "pivot_root")
    _check(LIBC.umount2(b".", DETACH), "umount2")
    os.chdir("/tmp")


def _show(path: str, how: int) -> None:
    _place(path, folder=os.path.isdir(f"/old{path}"))
    _mount(f"/old{path}", f"/new{path}", None, how)


def _place(path: str, *, folder: bool) -> None:
    """Something empty to mount upon."""
    os.makedirs(f"/new{path}" if folder else os.path.dirname(f"/new{path}"), 0o755, exist_ok=True)
    if not folder:
        open(f"/new{path}", "x").close()


def _make_read_only(path: str) -> None:
    values = struct.pack("=QQQQ", READ_ONLY_NOSUID, 0, 0, 0)
    done = LIBC.syscall(
        ctypes.c_long(MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        path.encode(),
        ctypes.c_uint(AT_RECURSIVE),
        values,
        ctypes.c_size_t(len(values)),
    )
    _check(done, "mount_setattr")


def _shed_rights(plan: dict) -> None:
    """Of root's rights only those of ``plan``; no system call that its filter refuses."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for right in range(last + 1):
        if right not in plan["rights"]:
            _check(LIBC.prctl(DROP_BOUND, right, 0, 0, 0), "prctl")
    _check(LIBC.prctl(NO_NEW_RIGHTS, 1, 0, 0, 0), "prctl")
    if plan["filter"]:
        lines = ctypes.create_string_buffer(plan["filter"], len(plan["filter"]))
        program = struct.pack("@HP", len(plan["filter"]) // 8, ctypes.addressof(lines))
        _check(LIBC.prctl(SECCOMP, 2, program, 0, 0), "seccomp")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str = ""
) -> None:
    done = LIBC.mount(
        source and source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        options.encode(),
    )
    _check(done, f"mount {target}")


def _check(done: int, what: str) -> None:
    if done != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
