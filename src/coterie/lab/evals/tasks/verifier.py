"""A script that compares answers with math-verify; see ``verify``.

It does not import the package, so it starts in a second, and it can be killed at any time. It reads
lines of JSON, ``[gold, answer]``, and writes "1" or "0" for each.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

TINY = 1e-3
MEMORY_LIMIT = 3 << 30  # bytes of address space


def main() -> None:
    """Compares pairs until standard input ends; a pair over the time limit ends the process.

    The argument is the limit in seconds of processor time.
    """
    seconds = float(sys.argv[1])
    warnings.simplefilter("ignore")
    is_equal = _load_comparison()
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with os.fdopen(os.dup(1), "w") as replies:
        _silence_output()
        replies.write("ready\n")
        replies.flush()
        for line in sys.stdin:
            gold, answer = json.loads(line)
            # The signal kills the process: no handler could interrupt a power of large integers.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            equal = is_equal(gold, answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(f"{int(equal)}\n")
            replies.flush()


def _load_comparison() -> Callable[[str, str], bool]:
    from math_verify import parse, verify

    def is_equal(gold: str, answer: str) -> bool:
        try:
            # 0 turns off math-verify's own timeouts.
            pair = [parse(f"${text}$", parsing_timeout=0) for text in (gold, answer)]
            equal = all(pair) and bool(verify(pair[0], pair[1], timeout_seconds=0))
            return equal and not _are_tiny_and_differ(pair[0][0], pair[1][0])
        # sympy and the parser raise many types; pairs that they cannot compare are unequal.
        except Exception:
            return False

    is_equal("1", "2")  # builds the grammar
    return is_equal


def _are_tiny_and_differ(gold: Any, answer: Any) -> bool:
    """Whether two numbers are equal only because math-verify rounds to a few decimals."""
    if not all(getattr(value, "is_number", False) for value in (gold, answer)):
        return False
    first, second = gold.evalf(15), answer.evalf(15)
    largest = max(abs(first), abs(second))
    return bool(largest < TINY and abs(first - second) > largest * TINY)


def _silence_output() -> None:
    """Discards standard output and error, to which the parser prints."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(devnull, stream)


if __name__ == "__main__":
    main()
