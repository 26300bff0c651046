"""The sandbox isolates generated code: every attack fails and leaves nothing running."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import coterie
from coterie.lab.sandbox import (
    ExecutionResult,
    Limits,
    backends,
)
from coterie.lab.sandbox.runner import _run_in

SHORT = Limits(cpu_seconds=1, wall_seconds=0.5, memory=256 << 20)
AMPLE = Limits(memory=256 << 20)
OUTSIDE = Path(__file__).with_name(f".outside-{uuid.uuid4().hex}")
HOME = Path.home()
PRIVATE = {path.name for path in HOME.glob("*")} - {
    Path(path).relative_to(HOME).parts[0]
    for path in backends.visible_paths()
    if Path(path).is_relative_to(HOME)
}


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A text on the command line of every process that the test starts in a sandbox."""
    mark, command = f"mark-{uuid.uuid4().hex}", backends.python_command

    def marked_command(*modules: str) -> list[str]:
        interpreter, *options = command(*modules)
        return [interpreter, "-X", mark, *options]

    monkeypatch.setattr(backends, "python_command", marked_command)
    yield mark
    assert remaining_processes(mark) == []


def remaining_processes(mark: str, timeout: float = 2.0) -> list[str]:
    """Processes with the mark, after those that are ending have ended."""
    deadline = time.monotonic() + timeout
    while (processes := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return processes


def marked_processes(mark: str) -> list[str]:
    def has_mark(process: Path) -> bool:
        try:
            return mark.encode() in (process / "cmdline").read_bytes()
        except OSError:
            return False

    return [process.name for process in Path("/proc").glob("[0-9]*") if has_mark(process)]


ATTACKS = {
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a fork bomb that fails": "import os\nwhile True: os.fork()",
    "threads without end": "import threading, time\n"
    "while True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "an endless loop": "while True: pass",
    "sleeping for ever": "import time\ntime.sleep(10**6)",
    "waiting for input": "input()",
    "10 GB of memory": "x = bytearray(10 << 30)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory in many processes": "import os, time\n"
    "for _ in range(6): os.fork()\nx = bytearray(b'x') * (200 << 20)\ntime.sleep(9)",
    "10 GB of output": "import sys\nfor _ in range(10 << 10): sys.stdout.write('x' * (1 << 20))",
    "10 GB of errors": "import os\nfor _ in range(10 << 10): os.write(2, b'x' * (1 << 20))",
    "10 GB in a file": "f = open('/tmp/f', 'wb')\n"
    "for _ in range(10 << 10): f.write(b'x' * (1 << 20))",
    "files without end": "n = 0\nwhile True: open(f'/tmp/{n}', 'w').close(); n += 1",
    "10 GB in many files": "for n in range(10**5): open(f'/tmp/{n}', 'wb').write(b'x' * (1 << 20))",
    "reading the home folder": f"import os\nassert not os.listdir({str(Path.home())!r}) and 0",
    "looking around in the home folder": f"import os\nos.listdir({str(Path.home())!r})",
    "reading a file of the home folder": f"open({str(OUTSIDE)!r}).read()",
    "reading the checkout": f"open({__file__!r}).read()",
    "reading the users": "open('/etc/passwd').read()",
    "opening a socket": "import socket\nsocket.socket()",
    "opening an internet socket by family": "import socket\nsocket.socket(socket.AF_INET6)",
    "asking for a name": "import socket\nsocket.create_connection(('localhost', 22), 1)",
    "calling the virtual machine's host": "import socket\nsocket.socket(40, socket.SOCK_STREAM)",
    "killing its parent": "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.1)\nassert 0",
    "killing every process": "import os\nos.kill(-1, 9)\nassert 0",
    "stopping its parent": "import os\nos.kill(os.getppid(), 19)\nassert 0",
    "writing outside": f"open({str(OUTSIDE)!r}, 'w').write('x')",
    "writing into the system": "open('/usr/lib/x', 'w').write('x')",
    "writing into the root": "open('/x', 'w').write('x')",
    "making a folder beside its own": "import os\nos.mkdir('/dev/x')",
    "closing stdout and the rest": "import os\nos.closerange(0, 1000)\nassert 0",
    "closing all and going": "import os\nos.closerange(0, 1000)\nos._exit(0)",
    "a daemon": "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
    "    time.sleep(99)\n  os._exit(0)\nos._exit(0)",
    "daemons that keep the pipes": "import os, time\nif os.fork() == 0:\n  os.setsid()\n"
    "  time.sleep(99)\nassert 0",
    "huge recursion": "import sys\nsys.setrecursionlimit(10**9)\n"
    "def f(): return [f() for _ in '1']\nf()",
    "plain recursion": "def f(): return f()\nf()",
    "deep syntax": "x = " + "(" * 10**5 + ")" * 10**5,
    "deleting its folder": "import os, shutil\nshutil.rmtree('/tmp')\nassert not os.getcwd()",
    "ignoring every signal": "import signal\nfor n in range(1, 65):\n"
    "  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
    "while True: pass",
    "raising its limits": "import resource\n"
    "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "becoming root": "import os\nos.setuid(0)\nassert os.listdir('/proc/1/fd')",
    "reading its supervisor's environment": "open('/proc/1/environ').read()",
    "writing to its supervisor": "open('/proc/1/fd/1', 'w').write('passed\\n\\n')",
    "mounting": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0",
    "a new user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "a new namespace by clone": "import ctypes\n"
    "assert ctypes.CDLL(None).syscall(56, 0x10000011, 0, 0, 0, 0) >= 0",
    "memory without an owner": "import os\nos.memfd_create('x')",
    "tracing its supervisor": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "crashing": "import ctypes\nctypes.string_at(0)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_fails_and_leaves_nothing(attack, backend, mark):
    start = time.monotonic()
    result = _run_in(backend, ATTACKS[attack], limits=SHORT)
    assert not result.passed, attack
    assert time.monotonic() - start < SHORT.wall_seconds + 5
    assert remaining_processes(mark) == []
    assert not OUTSIDE.exists()


def test_correct_programs_pass_between_attacks(backend, mark):
    programs = ["x = 1", ATTACKS["sleeping for ever"], "import re, typing, hashlib", "assert 0"]
    limits = [AMPLE, SHORT, AMPLE, AMPLE]
    pairs = zip(programs, limits, strict=True)
    statuses = [_run_in(backend, program, limits=each).status for program, each in pairs]
    assert statuses == ["passed", "timeout", "passed", "failed"]


def test_processor_time_has_its_own_limit(backend, mark):
    result = _run_in(
        backend, ATTACKS["an endless loop"], limits=Limits(cpu_seconds=1, wall_seconds=30)
    )
    assert result.status == "timeout"
    assert "processor time" in result.reason


@pytest.mark.parametrize(
    "program",
    [
        "",
        "print('x' * 10000)\nimport sys\nsys.stderr.write('warning')",
        "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import os\nif os.fork() == 0: os._exit(0)\nos.wait()",
        "import asyncio\nasyncio.run(asyncio.sleep(0))",
        "import sys\nsys.setrecursionlimit(9000)\ndef f(n): return n and f(n - 1)\nf(8000)",
        "from dataclasses import dataclass\n@dataclass\nclass A: x: int\nassert A(1) == A(1)",
        "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
        "import sys\nsys.stdout.close()",
        "assert __name__ == '__main__'",
        "x = '\ud800'",
        "é = 'ß'; assert len(é) == 1",
    ],
)
def test_ordinary_programs_pass(program, backend, mark):
    assert _run_in(backend, program, limits=AMPLE) == ExecutionResult("passed")


def test_the_same_program_gets_the_same_order_of_a_set(backend):
    first = "assert list({'a', 'b', 'c', 'd'}) == "
    reason = _run_in(backend, f"{first}0, list({{'a', 'b', 'c', 'd'}})", limits=AMPLE).reason
    order = reason[reason.index("[") : reason.index("]") + 1]
    assert all(_run_in(backend, first + order, limits=AMPLE).passed for _ in range(3))


def test_only_the_files_python_needs_are_visible(backend):
    program = "import os\nraise ValueError(sorted(os.listdir('/')))"
    visible = set(eval(_run_in(backend, program, limits=AMPLE).reason[len("ValueError(") : -1]))
    roots = {Path(path).parts[1] for path in backends.visible_paths()}
    assert visible <= roots | {"dev", "proc", "tmp", "lib", "lib32", "lib64"}
    assert not visible & {"home", "work", "mnt", "var", "run", "sys", "srv", "opt"} - roots


def test_a_tight_umask_of_the_caller_does_not_matter(backend):
    program = "import decimal\nopen('/dev/null', 'w').write('x')\nopen('/tmp/x', 'w').write('x')"
    before = os.umask(0o077)
    try:
        assert _run_in(backend, program, limits=AMPLE) == ExecutionResult("passed")
    finally:
        os.umask(before)


def test_a_program_is_not_root_and_has_an_empty_environment(backend):
    program = (
        "import os\n"
        "assert os.getuid() and os.geteuid() and os.getgid() and not os.getgroups()[1:]\n"
        "assert not set(os.environ) - {'PYTHONHASHSEED', 'PWD', 'LC_CTYPE', 'LD_LIBRARY_PATH'}\n"
        "effective = [l.split()[1] for l in open('/proc/self/status') if l.startswith('CapEff')]\n"
        "assert int(effective[0], 16) == 0\nassert os.getcwd() == '/tmp' and os.listdir('.') == []"
    )
    assert _run_in(backend, program, limits=AMPLE) == ExecutionResult("passed")


def test_an_error_is_one_printable_line(backend):
    reason = _run_in(backend, "raise ValueError('\\x1b[2J\\n' + 'x' * 9999)", limits=AMPLE).reason
    assert reason.isprintable()
    assert reason.startswith("ValueError(")
    assert len(reason) <= 200


CALLER = """
import sys, types
sys.modules["coterie"] = package = types.ModuleType("coterie")  # without the package's own imports
package.__path__ = {path!r}
import coterie.lab.sandbox.backends as backends
from coterie.lab.sandbox.runner import _run_in
from coterie.lab.sandbox.backends import Limits
command = backends.python_command
def marked_command(*modules):
    interpreter, *options = command(*modules)
    return [interpreter, "-X", {mark!r}, *options]
backends.python_command = marked_command
_run_in(backends.{backend!r}, "import time; time.sleep(99)", limits=Limits(wall_seconds=60))
"""


def test_killing_the_caller_kills_the_sandbox(backend, mark):
    text = CALLER.format(path=list(coterie.__path__), mark=mark, backend=backend)
    with subprocess.Popen([sys.executable, "-c", text]) as caller:
        deadline = time.monotonic() + 20
        # The caller, the sandbox, its process 1, the program and its tests.
        while len(marked_processes(mark)) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(marked_processes(mark)) >= 5
        caller.send_signal(signal.SIGKILL)
    assert remaining_processes(mark) == []


@pytest.mark.parametrize("target", ["os.getppid()", "1", "-1"])
@pytest.mark.parametrize("number", [2, 9, 15, 19])
def test_no_signal_reaches_the_supervisor(target, number, backend, mark):
    program = (
        f"import os\ntry: os.kill({target}, {number})\nexcept OSError: pass\nraise ValueError(7)"
    )
    result = _run_in(backend, program, limits=Limits(wall_seconds=2.0, memory=256 << 20))
    # Where all are one user, the signal also reaches the process of the tests.
    if target == "-1" and not getattr(backend, "separate_users", False):
        assert result.reason not in ("", "ended its sandbox")
    else:
        assert result == ExecutionResult("failed", "ValueError(7)")


def test_a_server_outside_is_unreachable(backend):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert not _run_in(backend, program, limits=AMPLE).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_thread_and_no_descriptor_leaks(backend):
    _run_in(backend, "x = 1", limits=AMPLE)
    before = threading.active_count(), sorted(os.listdir("/proc/self/fd"))
    for program in ("x = 1", "assert 0", "import os\nos._exit(0)"):
        _run_in(backend, program, limits=AMPLE)
    assert (threading.active_count(), sorted(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize(
    "attack",
    ["an endless loop", "sleeping for ever", "10 GB of memory", "10 GB of output",
     "10 GB in a file", "plain recursion", "closing all and going", "killing its parent",
     "a daemon", "daemons that keep the pipes"],
)  # fmt: skip
def test_a_trusted_program_has_limits(attack, mark):
    program = ATTACKS[attack].replace("/tmp/f", "f")
    assert not _run_in(backends.Unsandboxed(), program, limits=SHORT).passed


SYSTEM_FILES = """
import os
for folder, _, files in os.walk("/proc"):
    parts = folder.split("/")
    if len(parts) > 2 and parts[2].isdecimal():
        continue
    for name in set(files) - {"mounts"}:
        for flags in (os.O_WRONLY, os.O_RDONLY | os.O_NONBLOCK):
            try:
                os.open(f"{folder}/{name}", flags)
            except OSError:
                continue
            raise ValueError(folder, name)
"""


def test_no_file_of_the_kernel_can_be_read_or_written(backend):
    assert _run_in(backend, SYSTEM_FILES, limits=AMPLE) == ExecutionResult("passed")


def test_the_program_is_never_the_machines_root(backend):
    result = _run_in(backend, "raise ValueError(open('/proc/self/uid_map').read())", limits=AMPLE)
    inner, outer, _ = re.findall(r"\d+", result.reason)
    assert inner == "0" if getattr(backend, "separate_users", False) else int(outer) != 0


BUFFERS = {
    "sockets": "import socket\ndef buffers():\n    while True: yield socket.socketpair()",
    "large sockets": "import socket\n"
    "def buffers():\n"
    "    while True:\n"
    "        pair = socket.socketpair()\n"
    "        for end in pair:\n"
    "            try: end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)\n"
    "            except OSError: pass\n"
    "        yield pair",
    "sockets that wait": "import socket\n"
    "def buffers():\n"
    "    server = socket.socket(socket.AF_UNIX)\n"
    "    server.bind('/tmp/server')\n"
    "    server.listen(4096)\n"
    "    while True:\n"
    "        client = socket.socket(socket.AF_UNIX)\n"
    "        client.connect('/tmp/server')\n"
    "        yield [client]\n"
    "        client.close()",
    "datagrams that wait": "import socket\n"
    "def buffers():\n"
    "    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "    server.bind('/tmp/server')\n"
    "    while True:\n"
    "        client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "        client.connect('/tmp/server')\n"
    "        yield [client]\n"
    "        client.close()",
    "pipes": "import fcntl, io, os\n"
    "class End:\n"
    "    def __init__(self, fd): self.fd = fd\n"
    "    def setblocking(self, flag): os.set_blocking(self.fd, flag)\n"
    "    def send(self, data): return os.write(self.fd, data)\n"
    "def buffers():\n"
    "    while True:\n"
    "        pipe = os.pipe()\n"
    "        try: fcntl.fcntl(pipe[1], 1031, 1 << 20)\n"
    "        except OSError: pass\n"
    "        yield [End(pipe[1])]",
}
FILL = """
kept, size = [], 0
try:
    for ends in buffers():
        kept += ends
        for end in ends:
            end.setblocking(False)
            try:
                while True:
                    size += end.send(bytes(65536))
            except BlockingIOError:
                pass
except OSError:
    pass
raise ValueError(size)
"""


@pytest.mark.parametrize("kind", BUFFERS)
def test_the_kernel_holds_little_for_a_process(kind, backend):
    """Eight processes hold less than 128 MiB in buffers, whatever the machine allows."""
    reason = _run_in(backend, BUFFERS[kind] + FILL, limits=AMPLE).reason
    match = re.fullmatch(r"ValueError\((\d+)\)", reason)
    assert match is not None, reason
    assert int(match[1]) <= 16 << 20


def test_memory_that_is_shared_and_not_mapped_counts(backend):
    program = (
        "import mmap, os, time\nfor _ in range(2): os.fork()\n"
        "shared = mmap.mmap(-1, 100 << 20)\n"
        "for n in range(0, 100 << 20, 4096): shared[n] = 1\n"
        "shared.madvise(mmap.MADV_DONTNEED)\ntime.sleep(9)"
    )
    result = _run_in(backend, program, limits=AMPLE)
    assert "used more than 256 MB of memory" in result.reason
