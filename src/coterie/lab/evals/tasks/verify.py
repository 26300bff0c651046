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

from coterie.errors import CoterieError

CPU_SECONDS = 4.0  # of processor time for one pair
SCRIPT_PATH = Path(__file__).with_name("verifier.py")


@lru_cache(maxsize=1 << 14)
def is_equivalent_latex(gold: str, answer: str) -> bool:
    """False also for a pair that is no mathematics or takes longer than the deadline."""
    verifier = _acquire()
    try:
        equal = verifier.compare(gold, answer)
    except BaseException:
        verifier.close()
        raise
    if equal is None:
        verifier.close()
        return False
    _idle_verifiers.append(verifier)
    return equal


def require_math_verify() -> None:
    """Raises where math-verify is not installed or does not start; else one process is ready."""
    if find_spec("math_verify") is None:
        raise CoterieError("math500 is graded by math-verify: pip install 'coterie[lab]'")
    _idle_verifiers.append(_acquire())


class _VerifierProcess:
    """One process of ``verifier.py``."""

    def __init__(self) -> None:
        # -P: a module beside the script must not pass for one of the standard library.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT_PATH), str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            message = self.process.communicate()[1].strip().split("\n")[-1]
            raise CoterieError(
                f"math-verify does not start ({message}); see pip install coterie[lab]"
            )
        self.owner_pid = os.getpid()

    def compare(self, gold: str, answer: str) -> bool | None:
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


_idle_verifiers: list[_VerifierProcess] = []


def _acquire() -> _VerifierProcess:
    """One that waits, and is this process's own: a fork inherits its parent's."""
    while _idle_verifiers:
        with suppress(IndexError):  # another thread was faster
            verifier = _idle_verifiers.pop()
            if verifier.owner_pid == os.getpid():
                return verifier
    return _VerifierProcess()


@atexit.register
def _close_all() -> None:
    for verifier in _idle_verifiers:
        if verifier.owner_pid == os.getpid():
            verifier.close()
