"""Whether two LaTeX answers mean the same, by math-verify, with a deadline that nothing escapes.

math-verify's own timeouts are signal handlers: they work in a main thread only, and not while one
large number is being computed. So it runs in processes that the kernel ends, kept for the next
pair; any thread may ask.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from coterie.naming import CoterieError

SECONDS = 4.0  # of processor time for one pair
SCRIPT = Path(__file__).with_name("verifier.py")


@lru_cache(maxsize=1 << 14)
def mean_the_same(gold: str, answer: str) -> bool:
    """False also for a pair that is no mathematics or takes longer than the deadline."""
    verifier = _free()
    try:
        verdict = verifier.ask(gold, answer)
    except BaseException:
        verifier.close()
        raise
    if verdict is None:
        verifier.close()
        return False
    _idle.append(verifier)
    return verdict


def require_math_verify() -> None:
    """Raises where math-verify is not installed or does not start; else one process is ready."""
    if find_spec("math_verify") is None:
        raise CoterieError("math500 is graded by math-verify: pip install 'coterie[lab]'")
    _idle.append(_free())


class _Verifier:
    """One process of ``verifier.py``."""

    def __init__(self) -> None:
        # -P: a module beside the script must not pass for one of the standard library.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            said = self.process.communicate()[1].strip().split("\n")[-1]
            raise CoterieError(f"math-verify does not start ({said}); see pip install coterie[lab]")
        self.owner = os.getpid()

    def ask(self, gold: str, answer: str) -> bool | None:
        """None: it ended over the pair."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([gold, answer]) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
            return reply == "1\n" if reply else None
        return None

    def close(self) -> None:
        self.process.kill()
        with suppress(BrokenPipeError):
            self.process.communicate()


_idle: list[_Verifier] = []


def _free() -> _Verifier:
    """One that waits, and is this process's own: a fork inherits its parent's."""
    while _idle:
        with suppress(IndexError):  # another thread was faster
            verifier = _idle.pop()
            if verifier.owner == os.getpid():
                return verifier
    return _Verifier()


@atexit.register
def _close_all() -> None:
    for verifier in _idle:
        if verifier.owner == os.getpid():
            verifier.close()
