"""Process 1 of a sandbox: runs one program as its child and reports whether it reached its end.

It runs as text (``python -c``) where the package cannot be imported, and imports only modules that
load fast.

A program could find and print any secret, so the end is detected without one. The launcher waits
in a read before the program and again after it, from the same source line. The kernel reports the
stack pointer of a waiting process (``/proc/PID/syscall``). A report from inside the program has a
deeper stack, so it is rejected. If the kernel hides the stack pointer, the report is accepted.
"""

import marshal
import os
import resource
import select
import sys
import time
from contextlib import suppress
from types import ModuleType

POLL_SECONDS = 0.05  # interval of the checks of memory and of a child that reported its end
MAX_FILES = 5000  # empty files use kernel memory that no other limit counts
MAX_KILL_ROUNDS = 1000
STDERR_TAIL_BYTES = 2000
STACK_SLACK = 160  # bytes; a read is 40 deeper after threads, 700 deeper inside exec
PAGE_BYTES = 4096
WAIT_FD, DONE_FD = 3, 4  # file descriptors of the child


def main() -> None:
    request = _read_request()
    wait_read, wait_write = os.pipe()
    done_read, done_write = os.pipe()
    stdout_read, stdout_write = os.pipe()
    stderr_read, stderr_write = os.pipe()
    child = os.fork()
    if child == 0:
        _set_up_child(request, (stdout_write, stderr_write, wait_read, done_write))
        _run_program(request["program"], ModuleType("__main__"))
    for fd in (stdout_write, stderr_write, wait_read, done_write):
        os.close(fd)
    if not request["own_pid_namespace"]:
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: daemons become our children
    start_state = _wait_state(child, 1)
    if start_state == ():
        raise TimeoutError("the program's process does not become ready")
    if not request["separate_user"]:
        # PR_SET_DUMPABLE: a process of the same user cannot read our memory or our descriptors.
        _prctl(4, 0)
    os.write(1, b"started\n")
    os.write(wait_write, b".")
    status, reason = ChildMonitor(
        request, child, start_state, done_fd=done_read, stdout_fd=stdout_read, stderr_fd=stderr_read
    ).wait_for_result()
    _kill_all(request, child)
    os.write(1, f"{status}\n{reason}\n".encode("utf-8", "replace"))
    os._exit(0)


def _read_request() -> dict:
    """Reads eight bytes of length, then marshalled values. Stdin remains open."""
    size = int.from_bytes(_read_exactly(8), "big")
    return marshal.loads(_read_exactly(size))


def _read_exactly(size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        if not chunk:
            os._exit(3)
        data += chunk
    return bytes(data)


def _set_up_child(request: dict, fds: tuple[int, ...]) -> None:
    """Applies limits and user in the child, and closes all but five descriptors.

    ``fds`` become stdout, stderr, WAIT_FD and DONE_FD.
    """
    os.setsid()
    high_fds = [os.dup2(fd, 100 + index) for index, fd in enumerate(fds)]
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for number, fd in enumerate(high_fds, start=1):
        os.dup2(fd, number)
    os.closerange(DONE_FD + 1, 256)
    os.chdir(request["folder"])
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # the program is killed first if the machine runs out of memory
    for name, soft, hard in request["limits"]:
        limit = getattr(resource, name)
        hard_limit = resource.getrlimit(limit)[1]
        ceiling = hard if hard_limit == resource.RLIM_INFINITY else min(hard, hard_limit)
        try:
            resource.setrlimit(limit, (min(soft, ceiling), ceiling))
        except ValueError:  # macOS has no limit of the address space
            if request["own_pid_namespace"]:
                raise
    if request["uid"]:
        os.setgroups([])
        os.setresgid(request["uid"], request["uid"], request["uid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])


def _run_program(
    program: str,
    module: ModuleType,
    *,
    read=os.read,
    write=os.write,
    exit_process=os._exit,
    execute=exec,
    compile_program=compile,
    describe=repr,
    encode=str.encode,
) -> None:
    """Runs the program, then exits. Functions are bound as defaults, out of the program's reach."""
    sys.modules["__main__"] = module
    namespace, wait_fd, done_fd = vars(module), WAIT_FD, DONE_FD
    try:
        # One statement: both reads have the same stack depth, and no trace can jump between them.
        _ = (
            read(wait_fd, 1),
            execute(compile_program(program, "program", "exec"), namespace),
            write(done_fd, b"."),
            read(wait_fd, 2),
        )
    except BaseException as error:
        try:
            write(2, b"\n" + encode(describe(error), "utf-8", "replace")[:STDERR_TAIL_BYTES])
        finally:
            exit_process(1)
    exit_process(0)


def _wait_state(child: int, size: int, timeout: float = 2.0) -> tuple[str, ...] | None:
    """Call, stack pointer and address of a child that waits in a read of ``size`` bytes.

    Empty if it does not wait there in time; None if the kernel hides its state.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            with open(f"/proc/{child}/syscall", encoding="ascii") as file:
                call = file.read().split()
        except OSError:
            return None
        if len(call) == 9 and call[1:4:2] == [hex(WAIT_FD), hex(size)]:
            return call[0], call[-2], call[-1]
        if time.monotonic() > deadline:
            return ()
        time.sleep(0.0003)


def _is_same_state(state: tuple[str, ...], start_state: tuple[str, ...]) -> bool:
    """Whether both states are the same call at the same stack depth and address.

    Two paths through one C function differ slightly. A process that replaced itself by exec has
    other addresses.
    """
    call, stack, address = state
    is_near = abs(int(stack, 16) - int(start_state[1], 16)) <= STACK_SLACK
    return (
        call == start_state[0]
        and is_near
        and abs(int(address, 16) - int(start_state[2], 16)) <= PAGE_BYTES
    )


def _prctl(option: int, value: int) -> None:
    """Calls prctl(2) on systems that have it."""
    import ctypes

    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class ChildMonitor:
    """Watches the child until it reaches its end, exits or exceeds a limit."""

    def __init__(
        self,
        request: dict,
        child: int,
        start_state: tuple[str, ...] | None,
        *,
        done_fd: int,
        stdout_fd: int,
        stderr_fd: int,
    ) -> None:
        self.request, self.child, self.start_state = request, child, start_state
        self.done_fd, self.stderr_fd = done_fd, stderr_fd
        self.open_fds = {0, done_fd, stdout_fd, stderr_fd}
        self.has_reported, self.bytes_written, self.stderr_tail = False, 0, b""

    def wait_for_result(self) -> tuple[str, str]:
        deadline = time.monotonic() + self.request["wall_seconds"]
        while (remaining := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select(list(self.open_fds), [], [], min(remaining, POLL_SECONDS))
            for fd in ready:
                self._read_fd(fd)
            if self.has_reported and self._has_ended():
                return "passed", ""
            if self.bytes_written > self.request["output"]:
                return "failed", f"wrote more than {self.request['output'] >> 20} MB"
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                return self._exit_reason(status)
            if self.request["own_pid_namespace"] and (excess := _exceeded_limit(self.request)):
                return "failed", excess
        return "timeout", f"still running after {self.request['wall_seconds']:g} s"

    def _has_ended(self) -> bool:
        if self.start_state is None:
            return True
        state = _wait_state(self.child, 2, POLL_SECONDS / 10)
        return bool(state) and _is_same_state(state, self.start_state)

    def _read_fd(self, fd: int) -> None:
        chunk = os.read(fd, 65536)
        if fd == 0:  # the caller has ended
            _kill_all(self.request, self.child)
            os._exit(3)
        if not chunk:
            self.open_fds.discard(fd)
        elif fd == self.done_fd:
            self.has_reported = True
        else:
            self.bytes_written += len(chunk)
        if fd == self.stderr_fd:
            self.stderr_tail = (self.stderr_tail + chunk)[-STDERR_TAIL_BYTES:]

    def _exit_reason(self, status: int) -> tuple[str, str]:
        """Status and reason of a child that has exited: its last error line, or its signal."""
        if os.WIFSIGNALED(status):
            if os.WTERMSIG(status) in (9, 24):  # SIGKILL at the hard limit, SIGXCPU at the soft one
                seconds = self.request["cpu_seconds"]
                return "timeout", f"killed, or used up {seconds} s of processor time"
            return "failed", f"killed by signal {os.WTERMSIG(status)}"
        if select.select([self.stderr_fd], [], [], 0)[0]:
            self._read_fd(self.stderr_fd)
        lines = self.stderr_tail.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "exited before its end"
        return "failed", "".join(c for c in reason if c.isprintable())[:200]


def _exceeded_limit(request: dict) -> str:
    """The limit that all processes of the sandbox exceed together, or an empty text."""
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
            continue  # it ended meanwhile
    filesystem = os.statvfs(request["folder"])
    if filesystem.f_files - filesystem.f_ffree > MAX_FILES:
        return f"created more than {MAX_FILES} files"
    if pages * resource.getpagesize() > request["memory"]:
        return f"used more than {request['memory'] >> 20} MB of memory"
    if processes > request["processes"]:
        return f"started more than {request['processes']} processes"
    return ""


def _kill_all(request: dict, child: int) -> None:
    """Kills all descendants; in an own pid namespace, the kernel does so when process 1 ends."""
    if request["own_pid_namespace"]:
        return
    with suppress(OSError):
        os.killpg(child, 9)
    with suppress(OSError, ValueError):
        for _ in range(MAX_KILL_ROUNDS):  # orphans become our children one level at a time
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                for pid in file.read().split():
                    os.kill(int(pid), 9)
            os.waitpid(-1, 0)


if __name__ == "__main__":
    main()
