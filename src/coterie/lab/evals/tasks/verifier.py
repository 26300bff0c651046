"""A process of its own that asks math-verify whether two answers are the same; see ``verify``.

Run as a script, it imports nothing of ours: it starts in a second and can be killed at any time.
Lines of JSON come in, ``[gold, answer]``; "1" or "0" goes out for each.
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

MEMORY_LIMIT = 3 << 30  # bytes of address space


def main() -> None:
    """Answers until standard input ends; a pair that takes too long ends the process.

    The argument: seconds of processor time for a pair, so that a busy machine changes no verdict.
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
            # The kernel's own end for it: no handler could interrupt a power of large integers.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            equal = is_equal(gold, answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(f"{int(equal)}\n")
            replies.flush()


def _load_comparison() -> Callable[[str, str], bool]:
    from math_verify import parse, verify

    def is_equal(gold: str, answer: str) -> bool:
        try:
            # Its own timeouts are signals, which would need handlers: the kernel's is enough.
            pair = [parse(f"${text}$", parsing_timeout=0) for text in (gold, answer)]
            return all(pair) and bool(verify(pair[0], pair[1], timeout_seconds=0))
        # sympy and the parser raise what they like; what they cannot compare is not the same.
        except Exception:
            return False

    is_equal("1", "2")  # the first call builds the grammar
    return is_equal


def _silence_output() -> None:
    """Standard output and error go nowhere: the parser prints."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(devnull, stream)


if __name__ == "__main__":
    main()
