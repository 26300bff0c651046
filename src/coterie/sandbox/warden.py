"""Process 1 of a sandbox: runs one program as its child and tells whether it came to its end.

It runs as text (``python -c``) where nothing of ours can be imported, so it imports only what
starts fast.

How the end is known. No secret is handed over that a program could find or print. The child asks
to be let go before the program and again after it, from one and the same line, and both times
waits in a read. The kernel tells where its stack stands (``/proc/PID/syscall``): whoever asks from
inside the program stands deeper, so only the line after the program's last statement is believed.
Where the kernel does not tell, the word alone counts.
"""

import marshal
import os
import resource
import select
import sys
import time
from contextlib import suppress
from types import ModuleType

TICK = 0.05  # seconds between looks at memory, and at a child that asked
MOST_FILES = 5000  # empty ones too take memory, which nobody else counts
ROUNDS = 1000
LAST_WORDS = 2000  # bytes of what was written to stderr
SLACK = 160  # bytes: a read is 40 deeper once there were threads, one from inside exec 700
PAGE = 4096
WAIT, TELL = 3, 4  # file descriptors of the child


def main() -> None:
    order = _order()
    waiting, going = os.pipe()
    told, telling = os.pipe()
    output, printing = os.pipe()
    errors, erring = os.pipe()
    child = os.fork()
    if child == 0:
        _become(order, (printing, erring, waiting, telling))
        _launch(order["program"], ModuleType("__main__"))
    for end in (printing, erring, waiting, telling):
        os.close(end)
    if not order["alone"]:
        _control(36, 1)  # PR_SET_CHILD_SUBREAPER: daemons become our children
    start = _stand(child, 1)
    if start == ():
        raise TimeoutError("the program's process does not get ready")
    if not order["apart"]:
        # PR_SET_DUMPABLE: nobody of the same user may look into us or write to our descriptors.
        _control(4, 0)
    os.write(1, b"begun\n")
    os.write(going, b".")
    outcome, reason = Watch(order, child, start, told=told, output=output, errors=errors).result()
    _end_all(order, child)
    os.write(1, f"{outcome}\n{reason}\n".encode("utf-8", "replace"))
    os._exit(0)


def _order() -> dict:
    """What the host asks: eight bytes of length, then marshalled values. Stdin stays open."""
    size = int.from_bytes(_exactly(8), "big")
    return marshal.loads(_exactly(size))


def _exactly(size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(0, size - len(parts))
        if not part:
            os._exit(3)
        parts += part
    return bytes(parts)


def _become(order: dict, ends: tuple[int, ...]) -> None:
    """The child's side: no descriptor but five, all limits, and no right that it does not need.

    ``ends`` become its stdout, its stderr, WAIT and TELL.
    """
    os.setsid()
    high = [os.dup2(end, 100 + place) for place, end in enumerate(ends)]
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for number, end in enumerate(high, start=1):
        os.dup2(end, number)
    os.closerange(TELL + 1, 256)
    os.chdir(order["folder"])
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # should memory run out before a limit holds
    for name, soft, hard in order["limits"]:
        limit = getattr(resource, name)
        most = resource.getrlimit(limit)[1]
        ceiling = hard if most == resource.RLIM_INFINITY else min(hard, most)
        try:
            resource.setrlimit(limit, (min(soft, ceiling), ceiling))
        except ValueError:  # macOS knows no limit of the address space
            if order["alone"]:
                raise
    if order["uid"]:
        os.setgroups([])
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])


def _launch(
    text: str,
    module: ModuleType,
    *,
    read=os.read,
    tell=os.write,
    leave=os._exit,
    run=exec,
    build=compile,
    spell=repr,
    encode=str.encode,
) -> None:
    """Never returns. Whatever it calls is its own before the program could put another there."""
    sys.modules["__main__"] = module
    room, ask, say = vars(module), WAIT, TELL
    try:
        # One line: both reads stand equally deep, and no trace can jump between them.
        _ = read(ask, 1), run(build(text, "program", "exec"), room), tell(say, b"."), read(ask, 2)
    except BaseException as error:
        try:
            tell(2, b"\n" + encode(spell(error), "utf-8", "replace")[:LAST_WORDS])
        finally:
            leave(1)
    leave(0)


def _stand(child: int, size: int, patience: float = 2.0) -> tuple[str, ...] | None:
    """Where the child stands when it waits in a read of ``size`` bytes; empty if it does not.

    None where the kernel does not tell.
    """
    until = time.monotonic() + patience
    while True:
        try:
            with open(f"/proc/{child}/syscall", encoding="ascii") as file:
                call = file.read().split()
        except OSError:
            return None
        if len(call) == 9 and call[1:4:2] == [hex(WAIT), hex(size)]:
            return call[0], call[-2], call[-1]
        if time.monotonic() > until:
            return ()
        time.sleep(0.0003)


def _is_there(stand: tuple[str, ...], start: tuple[str, ...]) -> bool:
    """The same call, from the same depth and the same place in memory.

    A little apart, as two ways through one C function are; a process that has replaced itself by
    another is far from there, for the kernel gave that other addresses.
    """
    call, stack, place = stand
    near = abs(int(stack, 16) - int(start[1], 16)) <= SLACK
    return call == start[0] and near and abs(int(place, 16) - int(start[2], 16)) <= PAGE


def _control(option: int, value: int) -> None:
    """prctl(2), where there is one."""
    import ctypes

    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Watch:
    """Looks at the child until it has come to its end, or ends otherwise, or takes too much."""

    def __init__(
        self,
        order: dict,
        child: int,
        start: tuple[str, ...] | None,
        *,
        told: int,
        output: int,
        errors: int,
    ) -> None:
        self.order, self.child, self.start = order, child, start
        self.told, self.errors = told, errors
        self.open = {0, told, output, errors}
        self.asked, self.written, self.words = False, 0, b""

    def result(self) -> tuple[str, str]:
        until = time.monotonic() + self.order["seconds"]
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select(list(self.open), [], [], min(left, TICK))
            for end in ready:
                self._hear(end)
            if self.asked and self._has_ended():
                return "passed", ""
            if self.written > self.order["output"]:
                return "failed", f"wrote more than {self.order['output'] >> 20} MB"
            ended, status = os.waitpid(self.child, os.WNOHANG)
            if ended:
                return self._why(status)
            if self.order["alone"] and (excess := _excess(self.order)):
                return "failed", excess
        return "timeout", f"still running after {self.order['seconds']:g} s"

    def _has_ended(self) -> bool:
        if self.start is None:
            return True
        stand = _stand(self.child, 2, TICK / 10)
        return bool(stand) and _is_there(stand, self.start)

    def _hear(self, end: int) -> None:
        part = os.read(end, 65536)
        if end == 0:  # whoever asked is gone
            _end_all(self.order, self.child)
            os._exit(3)
        if not part:
            self.open.discard(end)
        elif end == self.told:
            self.asked = True
        else:
            self.written += len(part)
        if end == self.errors:
            self.words = (self.words + part)[-LAST_WORDS:]

    def _why(self, status: int) -> tuple[str, str]:
        """Of a child that ended by itself: what it wrote last, or what killed it."""
        if os.WIFSIGNALED(status):
            if os.WTERMSIG(status) in (9, 24):  # SIGKILL at the hard limit, SIGXCPU at the soft one
                return (
                    "timeout",
                    f"killed, or used up {self.order['processor']} s of processor time",
                )
            return "failed", f"killed by signal {os.WTERMSIG(status)}"
        if select.select([self.errors], [], [], 0)[0]:
            self._hear(self.errors)
        lines = self.words.decode("utf-8", "replace").strip().splitlines() or ["left on the way"]
        return "failed", "".join(c for c in lines[-1] if c.isprintable())[:200]


def _excess(order: dict) -> str:
    """What all processes here use too much of; nothing where there is no /proc."""
    pages = processes = 0
    try:
        names = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return ""
    for name in names:
        try:
            with open(f"/proc/{name}/statm", encoding="ascii") as file:
                pages += int(file.read().split()[1])
            processes += name != "1"
        except (OSError, IndexError):
            continue  # it ended while it was looked at
    room = os.statvfs(order["folder"])
    if room.f_files - room.f_ffree > MOST_FILES:
        return f"made more than {MOST_FILES} files"
    if pages * resource.getpagesize() > order["memory"]:
        return f"used more than {order['memory'] >> 20} MB of memory"
    if processes > order["processes"]:
        return f"started more than {order['processes']} processes"
    return ""


def _end_all(order: dict, child: int) -> None:
    """All that was started; where we are process 1, our own end takes it along."""
    if order["alone"]:
        return
    with suppress(OSError):
        os.killpg(child, 9)
    with suppress(OSError, ValueError):
        for _ in range(ROUNDS):  # what loses its parent becomes our child only then
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                for one in file.read().split():
                    os.kill(int(one), 9)
            os.waitpid(-1, 0)


if __name__ == "__main__":
    main()
