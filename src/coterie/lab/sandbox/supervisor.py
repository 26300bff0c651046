"""Process 1 of a sandbox: runs a program and its tests in two child processes.

It imports only modules that load fast. It reads the tests after it has forked the program's
process, so the memory of that process does not hold them. The process of the tests alone decides
whether they pass.
"""

import _signal  # pyright: ignore[reportMissingImports] -- loads faster than signal
import marshal
import os
import resource
import select
import sys
import time
from collections.abc import Callable

from coterie.lab.sandbox.remote_calls import Connection, run_tests, serve

POLL_SECONDS = 0.05  # interval of the checks of memory
EXIT_SECONDS = 0.003  # from the end of a process's pipes to its exit status
MAX_FILES = 5000  # empty files use kernel memory that no other limit counts
MAX_KILL_ROUNDS = 1000
STDERR_TAIL_BYTES = 2000
READ_FD, WRITE_FD = 3, 4  # of a child: its pipes to the other child


def main() -> None:
    stdin = Connection(0, 1)
    request = marshal.loads(stdin.receive())
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    connection = Connection(READ_FD, WRITE_FD)
    stdout, stderr, calls, replies = (os.pipe() for _ in range(4))
    program = _start_child(
        lambda: serve(request["program"], connection),
        request,
        request["uids"][0],
        (stdout[1], stderr[1], calls[0], replies[1]),
    )
    if not request["separate_users"]:
        _prctl(4, 0)  # PR_SET_DUMPABLE: no process of our user can read our memory or the tests'
    source, end = marshal.loads(stdin.receive()), os.pipe()
    tests = _start_child(
        lambda: run_tests(source, connection),
        request,
        request["uids"][1],
        (stdout[1], stderr[1], replies[0], calls[1], end[1]),
    )
    for fd in (stdout[1], stderr[1], *calls, *replies, end[1]):
        os.close(fd)
    if not request["own_pid_namespace"]:
        _prctl(1, 9)  # PR_SET_PDEATHSIG: we end with the caller
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: daemons become our children
    os.write(1, b"started\n")
    status, reason = ChildMonitor(
        request, program, tests, end_fd=end[0], stdout_fd=stdout[0], stderr_fd=stderr[0]
    ).wait_for_result()
    _kill_all(request, program, tests)
    os.write(1, f"{status}\n{reason}\n".encode("utf-8", "replace"))
    os._exit(0)


def _start_child(run: Callable[[], None], request: dict, uid: int, fds: tuple[int, ...]) -> int:
    """Forks a process that calls ``run``; its exit status is 0 if that returns."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _set_up_child(request, uid, fds)
        run()
        status = 0
    except BaseException as error:
        os.write(2, b"\n" + repr(error).encode("utf-8", "replace")[:STDERR_TAIL_BYTES])
    finally:
        os._exit(status)


def _set_up_child(request: dict, uid: int, fds: tuple[int, ...]) -> None:
    """Applies limits and user. ``fds`` become descriptors 1, 2, ...; all others are closed."""
    os.setsid()
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    high_fds = [os.dup2(fd, 100 + index) for index, fd in enumerate(fds)]
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for number, fd in enumerate(high_fds, start=1):
        os.dup2(fd, number)
    os.closerange(len(fds) + 1, 256)
    os.chdir(request["folder"])
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # it is killed first if the machine runs out of memory
    except OSError:
        pass
    for name, soft, hard in request["limits"]:
        limit = getattr(resource, name)
        hard_limit = resource.getrlimit(limit)[1]
        ceiling = hard if hard_limit == resource.RLIM_INFINITY else min(hard, hard_limit)
        try:
            resource.setrlimit(limit, (min(soft, ceiling), ceiling))
        except ValueError:  # macOS has no limit of the address space
            if request["own_pid_namespace"]:
                raise
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _prctl(option: int, value: int) -> None:
    """Calls prctl(2), which Linux has."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class ChildMonitor:
    """Watches the children until the tests end or a limit is exceeded."""

    def __init__(
        self,
        request: dict,
        program: int,
        tests: int,
        *,
        end_fd: int,
        stdout_fd: int,
        stderr_fd: int,
    ) -> None:
        self.request, self.program, self.tests = request, program, tests
        self.end_fd, self.stderr_fd = end_fd, stderr_fd
        self.open_fds = {end_fd, stdout_fd, stderr_fd}
        self.bytes_written, self.stderr_tail = 0, b""

    def wait_for_result(self) -> tuple[str, str]:
        deadline = time.monotonic() + self.request["wall_seconds"]
        while (remaining := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select(list(self.open_fds), [], [], min(remaining, POLL_SECONDS))
            for fd in ready:
                self._read_fd(fd)
            if self.bytes_written > self.request["output"]:
                return "failed", f"wrote more than {self.request['output'] >> 20} MB"
            if self.end_fd in ready:
                return self._result_of_tests()
            if self.request["own_pid_namespace"] and (excess := self._exceeded_limit()):
                return "failed", excess
        return "timeout", f"still running after {self.request['wall_seconds']:g} s"

    def _read_fd(self, fd: int) -> None:
        chunk = os.read(fd, 65536)
        if not chunk:
            self.open_fds.discard(fd)
        self.bytes_written += len(chunk)
        if fd == self.stderr_fd:
            self.stderr_tail = (self.stderr_tail + chunk)[-STDERR_TAIL_BYTES:]

    def _result_of_tests(self) -> tuple[str, str]:
        """If they fail, the reason is the signal that ended a process, or the last error line."""
        _, status = os.waitpid(self.tests, 0)
        if status == 0:
            return "passed", ""
        time.sleep(EXIT_SECONDS)
        for ended in (os.waitpid(self.program, os.WNOHANG)[1], status):
            if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) in (9, 24):  # hard limit, SIGXCPU
                seconds = self.request["cpu_seconds"]
                return "timeout", f"killed, or used up {seconds} s of processor time"
            if os.WIFSIGNALED(ended):
                return "failed", f"killed by signal {os.WTERMSIG(ended)}"
        if select.select([self.stderr_fd], [], [], 0)[0]:
            self._read_fd(self.stderr_fd)
        lines = self.stderr_tail.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "exited before its end"
        return "failed", "".join(c for c in reason if c.isprintable())[:200]

    def _exceeded_limit(self) -> str:
        """The limit that the program exceeds with all its processes, or an empty text.

        Address space counts: resident memory excludes pages that are shared and not mapped now.
        """
        pages = 0
        for name in filter(str.isdecimal, os.listdir("/proc")):
            if int(name) in (1, self.tests):
                continue
            try:
                with open(f"/proc/{name}/statm", encoding="ascii") as file:
                    pages += int(file.read().split()[0])
            except (OSError, IndexError):
                continue  # it ended meanwhile
        filesystem = os.statvfs(self.request["folder"])
        if filesystem.f_files - filesystem.f_ffree > MAX_FILES:
            return f"created more than {MAX_FILES} files"
        if pages * resource.getpagesize() > self.request["memory"]:
            return f"used more than {self.request['memory'] >> 20} MB of memory"
        return ""


def _kill_all(request: dict, program: int, tests: int) -> None:
    """Kills all descendants; in an own pid namespace, the kernel does so when process 1 ends."""
    if request["own_pid_namespace"]:
        return
    for group in (program, tests):
        try:
            os.killpg(group, 9)
        except OSError:
            continue  # it has ended
    try:
        for _ in range(MAX_KILL_ROUNDS):  # orphans become our children one level at a time
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                for pid in file.read().split():
                    os.kill(int(pid), 9)
            os.waitpid(-1, 0)
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    main()
