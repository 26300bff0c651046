"""Tests run in a process that never runs the program's code, so no program can make itself pass."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, defaultdict, namedtuple
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import TaskError
from coterie.lab.sandbox import Limits, backends, require_backend
from coterie.lab.sandbox.remote_calls import DATA_TYPES, decode, encode
from coterie.lab.sandbox.runner import _run_in

LIMITS = Limits(wall_seconds=3.0, memory=256 << 20)
CHEATS_LIMITS = Limits(wall_seconds=1.5, memory=256 << 20)  # some never end
TESTS = """\
import math

def check(candidate):
    assert candidate(2, 3) == 861005
    assert sorted([candidate(1, 1)]) == [861002], "a sum"
    assert math.isclose(candidate(0.5, 0.5), 861001)
    assert len(str(candidate(0, 1))) == 6 and isinstance(candidate(0, 1), int)

check(add)
"""
RIGHT = "def add(a, b): return a + b + 861000"
SEARCH = """
import re
def add(a, b):
    for line in open("/proc/self/maps"):
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        try:
            memory = open(f"/proc/{process}/mem", "rb")
            memory.seek(low)
            if found := re.search(b"86" b"[0-9]{4}", memory.read(high - low)):
                return int(found[0]) - 5 + a + b
        except (OSError, OverflowError, ValueError):
            continue
"""
# These reach for other processes, so they run in a sandbox only.
REACHING_CHEATS = {
    "a signal to the tests": "import os\ndef add(a, b):\n  for number in (2, 10, 14, 15, 9):\n"
    "    try: os.kill(os.getpid() + 1, number)\n    except OSError: pass",
    "a search of the supervisor's memory": "process = 1" + SEARCH,
    "a search of the tests' memory": "import os\nprocess = os.getpid() + 1" + SEARCH,
    "a daemon that lives on": "import os, time\nif os.fork() == 0:\n  time.sleep(99)\n"
    "def add(a, b): os._exit(0)",
}
CHEATS = {
    "an object that equals everything": "class E:\n  def __eq__(self, other): return True\n"
    "  __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: True\n"
    "  def __hash__(self): return 0\ndef add(a, b): return E()",
    "an object that is an int and equals everything": "class E(int):\n"
    "  def __eq__(self, other): return True\n  __hash__ = int.__hash__\n"
    "  def __sub__(self, other): return E(0)\ndef add(a, b): return E(7)",
    "an object that lies about its class": "class E:\n  __class__ = int\n"
    "  def __eq__(self, other): return True\n  def __iter__(self): return iter([861005])\n"
    "  def __len__(self): return 6\n  def __bool__(self): return True\ndef add(a, b): return E()",
    "replaced builtins": "import builtins\nfor name in ('sorted', 'len', 'str', 'isinstance'):\n"
    "  setattr(builtins, name, lambda *args: True)\n"
    "builtins.AssertionError = type('E', (Exception,), {})\ndef add(a, b): return 0",
    "functions with the names of builtins": "def sorted(x): return [861002]\n"
    "def len(x): return 6\ndef isinstance(*x): return True\ndef add(a, b): return 861005",
    "a replaced module": "import math, sys\nmath.isclose = lambda *args: True\n"
    "sys.modules['math'] = math\ndef add(a, b): return 861005",
    "a module in the folder": "for name in ('math', 'sitecustomize', 'fractions'):\n"
    "  open(f'/tmp/{name}.py', 'w').write('isclose = lambda *args: True')\n"
    "import os\ndef add(a, b):\n  raise ArithmeticError",
    "an own check": "def check(candidate): pass\ndef add(a, b): return 0",
    "sys.exit(0) at the top": "import sys\ndef add(a, b): return 0\nsys.exit(0)",
    "os._exit(0) at the top": "import os\ndef add(a, b): return 0\nos._exit(0)",
    "SystemExit in a call": "def add(a, b): raise SystemExit(0)",
    "os._exit(0) in a call": "import os\ndef add(a, b): os._exit(0)",
    "an error of an own class": "class E(BaseException): pass\ndef add(a, b): raise E",
    "an end of iteration": "def add(a, b): raise StopIteration",
    "at its exit": "import atexit, os, sys\natexit.register(os._exit, 0)\n"
    "def add(a, b): sys.exit(0)",
    "the frames above": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "  for space in (frame.f_globals, frame.f_locals):\n"
    "    for name in ('request', 'encode', 'decode', 'run_tests', 'source', 'tests'):\n"
    "      if name in space: space[name] = lambda *args: (True, 861005)\n"
    "  frame = frame.f_back\ndef add(a, b): return 0",
    "rewritten bytecode": "import gc, types\ndef nothing(*args, **kwargs): return 861005\n"
    "for f in gc.get_objects():\n"
    "  if type(f) is types.FunctionType and f.__name__ in ('check', 'run_tests', 'request'):\n"
    "    f.__code__ = nothing.__code__\ndef add(a, b): return 0",
    "a trace": "import sys\ndef trace(frame, event, arg):\n  frame.f_trace_lines = False\n"
    "sys.settrace(trace)\ndef add(a, b): return None",
    "the words of the supervisor": "print('started\\npassed\\n\\n')\nimport os\n"
    "os.write(1, b'started\\npassed\\n\\n')\ndef add(a, b): os._exit(0)",
    "every descriptor": "import os\ndef add(a, b):\n  for n in range(64):\n"
    "    try: os.write(n, b'passed\\n\\n' * 99)\n    except OSError: pass\n  os._exit(0)",
    "forged replies": "import os\nreply = b'u2:t1:1d0:'\n"
    "for _ in range(9): os.write(4, len(reply).to_bytes(8, 'big') + reply)\n"
    "def add(a, b): return 0",
    "a forged end": "import os\nos.close(4)\ndef add(a, b): return 0",
    "an endless reply": "import os\nos.write(4, b'\\xff' * 8)\ndef add(a, b): return 0",
    "a search of its memory": "process = 'self'" + SEARCH,
    "another program in its place": "import os, sys\ndef add(a, b):\n"
    "  os.execv(sys.executable, ['python', '-c', 'pass'])",
}  # fmt: skip

Pair = namedtuple("Pair", "left right")
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False) | st.sampled_from(DATA_TYPES),
    lambda inner: st.lists(inner, max_size=4)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
    | st.sets(st.integers(), max_size=4)
    | st.frozensets(st.text(max_size=3), max_size=4),
    max_leaves=20,
)  # fmt: skip


@pytest.fixture(params=backends.backend_candidates(), ids=repr)
def backend(request: pytest.FixtureRequest) -> backends.SandboxBackend:
    try:
        assert _run_in(request.param, RIGHT, TESTS).passed
    except (TaskError, OSError):
        pytest.skip(f"NOT TESTED: {request.param} does not work here")
    return request.param


@pytest.mark.parametrize("cheat", CHEATS | REACHING_CHEATS)
def test_a_program_cannot_make_itself_pass(cheat, backend):
    result = _run_in(backend, (CHEATS | REACHING_CHEATS)[cheat], TESTS, CHEATS_LIMITS)
    assert not result.passed
    assert result.reason


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_trusted_program_cannot_either(cheat):
    assert not _run_in(backends.Unsandboxed(), CHEATS[cheat], TESTS, CHEATS_LIMITS).passed


def canonical(value: object) -> object:
    """Equal for values of equal types and content, whatever the order of a set."""
    if isinstance(value, list | tuple | dict):
        parts = value.items() if isinstance(value, dict) else value
        return type(value), list(map(canonical, parts))
    return type(value), sorted(map(repr, value)) if isinstance(value, set | frozenset) else repr(
        value
    )


def no_object(value: object) -> int:
    raise TypeError(value)


def no_number(number: int) -> object:
    raise ValueError(number)


@given(plain)
def test_plain_data_crosses_unchanged(value):
    assert canonical(decode(encode(value, no_object), no_number)) == canonical(value)


def is_plain(value: object) -> bool:
    if type(value) is dict:
        return all(map(is_plain, value.items()))
    if type(value) in (list, tuple, set, frozenset):
        return all(map(is_plain, value))  # type: ignore
    return value in DATA_TYPES or type(value) in (*DATA_TYPES, Fraction)


@given(plain, st.binary(max_size=6), st.integers(0, 200), st.integers(0, 6))
def test_any_message_is_plain_data_or_refused(value, change, place, cut):
    message = encode(value, no_object)
    changed = message[:place] + change + message[place + cut :]
    with suppress(ValueError, LookupError, TypeError, ArithmeticError, MemoryError):
        assert is_plain(decode(changed, no_number))


@pytest.mark.parametrize(
    ("value", "crossed"),
    [
        (Pair(1, 2), (1, 2)),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, {1: [2]}), {1: [2]}),
        ({1: 2}.keys(), {1}),
        (bytearray(b"x"), b"x"),
        (Decimal("0.5"), Fraction(1, 2)),
        (float("inf"), float("inf")),
        (1 << 20_000, 1 << 20_000),
        ("\ud800", "\ud800"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_crosses_as_data_that_equals_it(value, crossed):
    got = decode(encode(value, no_object), no_number)
    assert (type(got), got) == (type(crossed), crossed)
    assert got == value


ORDINARY = {
    "a class": ("class P:\n  def __init__(s, x): s.x = x\n  def double(s): return 2 * s.x\n"
                "def f(p): return p.x", "p = P(3)\np.x = 4\nassert f(p) == 4 and p.double() == 8"),
    "a generator": ("def f():\n  n = 0\n  while True:\n    yield n\n    n += 1",
                    "g = f()\nassert [next(g), next(g)] == [0, 1]\n"
                    "assert [x for x, _ in zip(f(), range(3))] == [0, 1, 2]"),
    "an iterator that ends": ("def f(): return map(str, [1, 2])", "assert list(f()) == ['1', '2']"),
    "an error": ("def f(x): raise ValueError('no')",
                 "try: f(1)\nexcept ValueError as e: assert e.args == ('no',)\nelse: assert False"),
    "a builtin name": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
    "a type as an argument": ("def f(t): return t('3')", "assert f(int) == 3"),
    "a keyword": ("def f(*, a): return a", "assert f(a=(1, [2])) == (1, [2])"),
    "a function that returns one": ("def f(): return lambda x: x + 1", "assert f()(1) == 2"),
    "a constant": ("N = {1: 'x'}", "assert N == {1: 'x'}"),
    "an object without data": ("class P: pass\ndef f(): return P()", "assert f() != 1 and f()"),
    "an empty object": ("class P:\n  def __len__(s): return 0\ndef f(): return P()",
                        "assert not f() and len(f()) == 0"),
    "an index": ("from collections import deque\ndef f(): return deque([5, 6])",
                 "assert f()[1] == 6"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_tests_pass(kind):
    program, tests = ORDINARY[kind]
    result = _run_in(require_backend(trust=True), program, tests, LIMITS)
    assert result.passed, result.reason


def test_the_reason_is_the_programs_own_error():
    backend = require_backend(trust=True)
    assert _run_in(backend, "def f(): raise KeyError('x')", "f()").reason == "KeyError('x')"
    assert re.match("NameError", _run_in(backend, "x = 1", "f()").reason)
