"""Equivalence of LaTeX answers by math-verify, with a deadline that always holds.

math-verify's own timeouts are signal handlers. They work in the main thread only, and cannot
interrupt the computation of one large number. So it runs in a pool of child processes with a kernel
limit. Any thread may call it.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from coterie.errors import TaskError

CPU_SECONDS = 4.0  # per pair
SCRIPT_PATH = Path(__file__).with_name("verifier.py")


@lru_cache(maxsize=1 << 14)
def is_equivalent_latex(gold: str, answer: str) -> bool:
    """Whether two answers are equal; false for invalid LaTeX or a timeout.

    Raises TaskError if the process was killed from outside, as the system does without memory.
    """
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
    """Starts one process; raises TaskError if math-verify is not installed or does not start."""
    if find_spec("math_verify") is None:
        raise TaskError("math500 needs math-verify: pip install '.[lab]' in a clone of Coterie")
    _idle_verifiers.append(_acquire())


class _VerifierProcess:
    """One process of ``verifier.py``."""

    def __init__(self) -> None:
        # -P: a module in the script's folder must not replace one of the standard library.
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
            raise TaskError(
                f"math-verify does not start ({message}); try pip install '.[lab]' in a clone"
            )
        self.owner_pid = os.getpid()

    def compare(self, gold: str, answer: str) -> bool | None:
        """Whether a pair is equal; None if the process ended on it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([gold, answer]) + "\n")
            self.process.stdin.flush()
            if reply := self.process.stdout.readline():
                return reply == "1\n"
        if self.process.wait() == -signal.SIGKILL:
            raise TaskError("math-verify was killed; memory may have run out")
        return None

    def close(self) -> None:
        self.process.kill()
        with suppress(BrokenPipeError):
            self.process.communicate()


_idle_verifiers: list[_VerifierProcess] = []


def _acquire() -> _VerifierProcess:
    """An idle process, or a new one; a fork must not use those of its parent."""
    while _idle_verifiers:
        with suppress(IndexError):  # taken by another thread
            verifier = _idle_verifiers.pop()
            if verifier.owner_pid == os.getpid():
                if verifier.process.poll() is None:
                    return verifier
                verifier.close()
    return _VerifierProcess()


@atexit.register
def _close_all() -> None:
    for verifier in _idle_verifiers:
        if verifier.owner_pid == os.getpid():
            verifier.close()
