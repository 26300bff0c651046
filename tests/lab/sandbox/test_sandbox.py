"""Generated code is kept in: every attack is just a wrong answer, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coterie
from coterie.errors import CoterieError
from coterie.lab.sandbox import (
    ExecutionResult,
    Limits,
    available_backend,
    backends,
    require_backend,
    run_program,
    run_programs,
)
from coterie.lab.sandbox.runner import _backend_problem, _run_in
from coterie.lab.sandbox.syscalls import SYSCALL_TABLES, seccomp_filter

SHORT = Limits(cpu_seconds=1, wall_seconds=0.5, memory=256 << 20)
AMPLE = Limits(memory=256 << 20)
FENCES = backends.backend_candidates()
for absent in (
    backends.Bubblewrap("/usr/bin/bwrap", separate_user=False),
    backends.Namespaces(separate_user=False),
):
    if absent.name not in [fence.name for fence in FENCES]:
        FENCES.append(absent)  # so that its absence is told
BEST = {
    fence.name: fence for fence in reversed(FENCES)
}  # of each kind; the others are tried slowly
OUTSIDE = Path(__file__).with_name(f".outside-{uuid.uuid4().hex}")
HOME = Path.home()
PRIVATE = {path.name for path in HOME.glob("*")} - {
    Path(path).relative_to(HOME).parts[0]
    for path in backends.visible_paths()
    if Path(path).is_relative_to(HOME)
}


def of(fence: backends.SandboxBackend) -> str:
    user = "own-user" if getattr(fence, "apart", False) else "user-namespace"
    return f"{fence.name}-{user}"


@pytest.fixture(
    params=[
        pytest.param(
            fence, id=of(fence), marks=() if fence is BEST[fence.name] else pytest.mark.slow
        )
        for fence in FENCES
    ]
)
def walls(request: pytest.FixtureRequest) -> backends.SandboxBackend:
    """Each fence that can work here; a loud skip for one that does not."""
    if (trouble := _backend_problem(request.param)) is not None:
        pytest.skip(f"NOT TESTED: {of(request.param)} does not work on this machine ({trouble})")
    return request.param


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A word on the command line of every process that the test starts in a sandbox."""
    word, text = f"mark-{uuid.uuid4().hex}", backends._script_text
    monkeypatch.setattr(backends, "_script_text", lambda name: f"{text(name)}\n# {word}\n")
    yield word
    assert living(word) == []


def living(word: str, patience: float = 2.0) -> list[str]:
    """Processes that carry the mark once those that are ending have ended."""
    until = time.monotonic() + patience
    while (found := marked(word)) and time.monotonic() < until:
        time.sleep(0.01)
    return found


def marked(word: str) -> list[str]:
    def carries(process: Path) -> bool:
        try:
            return word.encode() in (process / "cmdline").read_bytes()
        except OSError:
            return False

    return [process.name for process in Path("/proc").glob("[0-9]*") if carries(process)]


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
    "killing everybody": "import os\nos.kill(-1, 9)\nassert 0",
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
    "looking at its warden": "open('/proc/1/environ').read()",
    "writing to its warden": "open('/proc/1/fd/1', 'w').write('passed\\n\\n')",
    "mounting": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0",
    "an own user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "an own namespace by clone": "import ctypes\n"
    "assert ctypes.CDLL(None).syscall(56, 0x10000011, 0, 0, 0, 0) >= 0",
    "memory of nobody": "import os\nos.memfd_create('x')",
    "tracing its warden": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "crashing": "import ctypes\nctypes.string_at(0)",
}
CHEATS = {
    "becoming another process": "import os, sys\n"
    "for n in (3, 4): os.set_inheritable(n, True)\n"
    "os.execv(sys.executable, ['python', '-c', 'import os; os.write(4, b\".\"); os.read(3, 2)'])",
    "a cleared object": "import os\nclass E(Exception):\n"
    "  def __del__(self): os.write(4, b'.'); os.read(3, 2)\nraise E",
    "an alarm on the way out": "import os, signal\n"
    "def more(*_): os.write(4, b'.'); os.read(3, 2)\n"
    "signal.signal(signal.SIGALRM, more)\nsignal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)\n"
    "raise ValueError",
    "a trace of the launcher": "import os, sys\n"
    "def more(*_): os.write(4, b'.'); os.read(3, 2)\n"
    "sys._getframe(1).f_trace = more\nsys.settrace(more)\nraise ValueError",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "raise SystemExit": "raise SystemExit",
    "printing passed": "print('begun\\npassed\\n')\nimport os\n"
    "os.write(1, b'passed\\n')\nos._exit(0)",
    "every descriptor": "import os\nfor n in range(64):\n  try: os.write(n, b'.passed\\n\\n')\n"
    "  except OSError: pass\nos._exit(0)",
    "playing the launcher": "import os\nos.write(4, b'.')\nos.read(3, 2)",
    "playing it in a thread": "import os, threading, time\n"
    "threading.Thread(target=lambda: (os.write(4, b'.'), os.read(3, 2))).start()\ntime.sleep(99)",
    "another exit": "import os, builtins\n"
    "def more(*_): os.write(4, b'.'); os.read(3, 2)\n"
    "os._exit = builtins.repr = builtins.exec = more\nraise ValueError",
    "at its exit": "import atexit, os\n@atexit.register\n"
    "def f(): os.write(4, b'.'); os.read(3, 2)\n"
    "raise SystemExit(0)",
    "an error that plays on": "import os\nclass E(Exception):\n"
    "  def __repr__(self): os.write(4, b'.'); os.read(3, 2)\nraise E",
    "a hook for errors": "import os, sys\n"
    "def more(*_): os.write(4, b'.'); os.read(3, 2)\nsys.excepthook = more\n1 / 0",
    "the frames above": "import os, sys\nframe = sys._getframe()\nfound = []\n"
    "while frame:\n  found += [repr(frame.f_locals), repr(frame.f_code.co_consts)]\n"
    "  frame = frame.f_back\n"
    "for n in (1, 2, 4): os.write(n, '\\n'.join(found).encode())\nos._exit(0)",
    "all that the collector knows": "import gc, os\n"
    "os.write(4, repr([o for o in gc.get_objects() if type(o) is dict])[:9999].encode())\n"
    "os._exit(0)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_a_wrong_answer_and_nothing_is_left(attack, walls, mark):
    began = time.monotonic()
    verdict = _run_in(walls, ATTACKS[attack], SHORT)
    assert not verdict.passed, attack
    assert time.monotonic() - began < SHORT.wall_seconds + 5
    assert living(mark) == []
    assert not OUTSIDE.exists()


@pytest.mark.parametrize("cheat", CHEATS)
def test_who_does_not_reach_the_end_does_not_pass(cheat, walls, mark):
    verdict = _run_in(walls, CHEATS[cheat], SHORT)
    assert not verdict.passed
    assert verdict.reason


def test_what_is_right_passes_beside_attacks(walls, mark):
    programs = ["x = 1", ATTACKS["sleeping for ever"], "import re, typing, hashlib", "assert 0"]
    limits = [AMPLE, SHORT, AMPLE, AMPLE]
    outcomes = [_run_in(walls, *asked).status for asked in zip(programs, limits, strict=True)]
    assert outcomes == ["passed", "timeout", "passed", "failed"]


def test_processor_time_has_its_own_limit(walls, mark):
    verdict = _run_in(walls, ATTACKS["an endless loop"], Limits(cpu_seconds=1, wall_seconds=30))
    assert verdict.status == "timeout"
    assert "processor time" in verdict.reason


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
def test_ordinary_programs_pass(program, walls, mark):
    assert _run_in(walls, program, AMPLE) == ExecutionResult("passed")


def test_the_same_program_gets_the_same_order_of_a_set(walls):
    first = "assert list({'a', 'b', 'c', 'd'}) == "
    told = _run_in(walls, f"{first}0, list({{'a', 'b', 'c', 'd'}})", AMPLE).reason
    order = told[told.index("[") : told.index("]") + 1]
    assert all(_run_in(walls, first + order, AMPLE).passed for _ in range(3))


def test_only_what_python_needs_is_seen(walls):
    program = "import os\nraise ValueError(sorted(os.listdir('/')))"
    seen = set(eval(_run_in(walls, program, AMPLE).reason[len("ValueError(") : -1]))
    roots = {Path(path).parts[1] for path in backends.visible_paths()}
    assert seen <= roots | {"dev", "proc", "tmp", "lib", "lib32", "lib64"}
    assert not seen & {"home", "work", "mnt", "var", "run", "sys", "srv", "opt"} - roots


def test_a_tight_mask_of_ours_shuts_nobody_out(walls):
    program = "import decimal\nopen('/dev/null', 'w').write('x')\nopen('/tmp/x', 'w').write('x')"
    before = os.umask(0o077)
    try:
        assert _run_in(walls, program, AMPLE) == ExecutionResult("passed")
    finally:
        os.umask(before)


def test_nobody_is_root_inside_and_the_environment_is_empty(walls):
    program = (
        "import os\n"
        "assert os.getuid() and os.geteuid() and os.getgid() and not os.getgroups()[1:]\n"
        "assert not set(os.environ) - {'PYTHONHASHSEED', 'PWD', 'LC_CTYPE', 'LD_LIBRARY_PATH'}\n"
        "held = [l.split()[1] for l in open('/proc/self/status') if l.startswith('CapEff')]\n"
        "assert int(held[0], 16) == 0\nassert os.getcwd() == '/tmp' and os.listdir('.') == []"
    )
    assert _run_in(walls, program, AMPLE) == ExecutionResult("passed")


def test_an_error_is_told_in_one_printable_line(walls):
    told = _run_in(walls, "raise ValueError('\\x1b[2J\\n' + 'x' * 9999)", AMPLE).reason
    assert told.isprintable()
    assert told.startswith("ValueError(")
    assert len(told) <= 200


ALONE = """
import sys, types
sys.modules["coterie"] = room = types.ModuleType("coterie")  # without what the package brings along
room.__path__ = {path!r}
import coterie.lab.sandbox.backends as f
from coterie.lab.sandbox.runner import _run_in
from coterie.lab.sandbox.result import Limits
text = f._text
f._text = lambda name: text(name) + "\\n# {mark}\\n"
_run_in(f.{walls!r}, "import time; time.sleep(99)", Limits(seconds=60))
"""


def test_killing_us_kills_what_we_started(walls, mark):
    text = ALONE.format(path=list(coterie.__path__), mark=mark, walls=walls)
    with subprocess.Popen([sys.executable, "-c", text]) as ours:
        until = time.monotonic() + 20
        while len(marked(mark)) < 4 and time.monotonic() < until:  # us, the fence, 1, the program
            time.sleep(0.02)
        assert len(marked(mark)) >= 4
        ours.send_signal(signal.SIGKILL)
    assert living(mark) == []


@pytest.mark.parametrize("whom", ["os.getppid()", "1", "-1"])
@pytest.mark.parametrize("number", [9, 15, 19])
def test_no_signal_reaches_who_judges(whom, number, walls, mark):
    program = (
        f"import os\ntry: os.kill({whom}, {number})\nexcept OSError: pass\nraise ValueError(7)"
    )
    assert _run_in(walls, program, AMPLE) == ExecutionResult("failed", "ValueError(7)")


def test_a_server_outside_is_not_reached(walls):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert not _run_in(walls, program, AMPLE).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_thread_and_no_descriptor_of_ours_is_left(walls):
    _run_in(walls, "x = 1", AMPLE)
    before = threading.active_count(), sorted(os.listdir("/proc/self/fd"))
    for program in ("x = 1", "assert 0", "import os\nos._exit(0)"):
        _run_in(walls, program, AMPLE)
    assert (threading.active_count(), sorted(os.listdir("/proc/self/fd"))) == before


@given(st.lists(st.booleans(), max_size=6), st.integers(1, 4))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_are_judged_one_by_one_and_in_order(right, workers):
    if available_backend() is None:
        pytest.skip("NOT TESTED: nothing here can keep code in")
    verdicts = run_programs([f"assert {r}" for r in right], AMPLE, workers=workers)
    assert [verdict.passed for verdict in verdicts] == right


def without_bubblewrap(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))


def with_a_bubblewrap_that_is_forbidden(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    bwrap = folder / "bwrap"
    bwrap.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n"
    )
    bwrap.chmod(0o755)
    without_bubblewrap(monkeypatch, folder)


SPOILED: list[Callable[[pytest.MonkeyPatch, Path], None]] = [
    without_bubblewrap,
    with_a_bubblewrap_that_is_forbidden,
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_without_a_bubblewrap_that_works_namespaces_keep_code_in(spoil, monkeypatch, tmp_path):
    spoil(monkeypatch, tmp_path)
    if available_backend() is None:
        pytest.skip("NOT TESTED: this machine allows no namespaces")
    assert available_backend() == "namespaces"
    assert run_program("x = 1").passed
    assert not run_program("open('/etc/passwd')").passed


def test_without_any_fence_code_is_refused_by_name_unless_it_is_trusted(monkeypatch):
    monkeypatch.setattr(
        "coterie.lab.sandbox.runner.candidates", lambda: [backends.Bubblewrap("/bin/false", False)]
    )
    assert available_backend() is None
    with pytest.raises(CoterieError, match=r"install bubblewrap.*--trust-generated-code"):
        run_program("x = 1")
    with pytest.raises(CoterieError, match=r"bubblewrap: the sandbox does not start"):
        run_programs([])
    assert isinstance(require_backend(trust=True), backends.Unsandboxed)
    assert run_program("x = 1", trust=True).passed


@pytest.mark.parametrize(
    "attack",
    ["an endless loop", "sleeping for ever", "10 GB of memory", "10 GB of output",
     "10 GB in a file", "plain recursion", "closing all and going", "killing its parent",
     "a daemon", "daemons that keep the pipes"],
)  # fmt: skip
def test_a_trusted_program_still_has_limits(attack, mark):
    program = ATTACKS[attack].replace("/tmp/f", "f")
    assert not _run_in(backends.Unsandboxed(), program, SHORT).passed


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_trusted_program_too_has_to_reach_its_end(cheat):
    assert not _run_in(backends.Unsandboxed(), CHEATS[cheat], SHORT).passed


def test_the_filter_is_known_for_two_machines_and_only_those():
    assert {name: len(seccomp_filter(name) or b"") % 8 for name in SYSCALL_TABLES} == dict.fromkeys(
        SYSCALL_TABLES, 0
    )
    assert seccomp_filter("vax") is None
