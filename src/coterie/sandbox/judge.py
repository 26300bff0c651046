"""Runs programs behind the best fence that works here, some at a time."""

from __future__ import annotations

import marshal
import os
import random
import selectors
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

from coterie.naming import CoterieError
from coterie.sandbox.fences import ENVIRONMENT, Fence, Open, Start, candidates
from coterie.sandbox.verdict import Limits, Verdict

LIMITS = Limits()
PROBE = Limits(processor=2, seconds=10.0)
# Does as the launcher does, from inside; the alarm ends it, for nobody answers.
CLAIMED = """
import os, signal
signal.setitimer(signal.ITIMER_REAL, 0.1)
os.write(4, b".")
os.read(3, 2)
"""
STARTING = 20.0  # seconds that a warden may take before and after its program
ANSWER = 4096  # bytes: more than a warden ever says
ATTEMPTS = 3
USERS = range(61184, 65520)  # ids that systems keep for users who live for a moment


def run(program: str, limits: Limits = LIMITS, trust: bool = False) -> Verdict:
    """Whether ``program``, a whole Python text, runs to its end without an error.

    An exit on the way, of whatever status, is no pass. CoterieError where nothing can keep it in
    and it is not trusted, or where no sandbox starts any more. Policies often write the same
    program: its verdict is remembered.
    """
    return _remembered(require_fence(trust), program, limits)


def run_many(
    programs: Sequence[str],
    limits: Limits = LIMITS,
    trust: bool = False,
    *,
    workers: int | None = None,
) -> list[Verdict]:
    """Every program's verdict, in order; ``workers`` at a time (one for each core)."""
    fence = require_fence(trust)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: _remembered(fence, program, limits), programs))


def fence() -> str | None:
    """What keeps programs in on this machine, "bubblewrap" or "namespaces", if anything does."""
    return next((fence.name for fence in candidates() if _trouble(fence) is None), None)


def require_fence(trust: bool = False) -> Fence:
    """The best fence that works; without any, none at all if trusted and a CoterieError if not."""
    troubles: list[str] = []
    for fence in candidates():
        trouble = _trouble(fence)
        if trouble is None:
            return fence
        troubles.append(f"{fence.name}: {trouble}")
    if trust:
        return Open()
    raise CoterieError(
        "nothing here can keep generated code in"
        f" ({'; '.join(dict.fromkeys(troubles)) or 'this needs Linux'});"
        " install bubblewrap, allow user namespaces, or pass --trust-generated-code"
    )


@cache
def _trouble(fence: Fence) -> str | None:
    """Why a fence does not work, tried once: what is right must pass, an early exit must not."""
    try:
        right = _run_in(fence, "import math\nassert math.sqrt(4) == 2", PROBE)
        if not right.passed:
            return f"a right program ends with {right.reason}"
        if _run_in(fence, CLAIMED, PROBE).passed:
            return "a program that only claims to have ended passes"
    except (CoterieError, OSError) as error:
        return str(error)
    return None


@lru_cache(maxsize=4096)
def _remembered(fence: Fence, program: str, limits: Limits) -> Verdict:
    return _run_in(fence, program, limits)


def _run_in(fence: Fence, program: str, limits: Limits) -> Verdict:
    """Asks again when the sandbox itself, and not the program, did not get going."""
    said = ""
    for _ in range(ATTEMPTS):
        with fence.start(limits) as start:
            begun, verdict, said = _attend(start, program, limits)
        if begun:
            return verdict
    raise CoterieError(f"the sandbox does not start: {said or 'it says nothing'}")


def _attend(start: Start, program: str, limits: Limits) -> tuple[bool, Verdict, str]:
    """Whether the program was begun, what came of it, and the last complaint of what ran it."""
    process = subprocess.Popen(
        start.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=start.inherited,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            order = marshal.dumps(_order(start, program, limits))
            _send(process.stdin.fileno(), len(order).to_bytes(8, "big") + order)
            ends = (process.stdout.fileno(), process.stderr.fileno())
            answer, complaint = _listen(ends, limits.seconds + STARTING)
        finally:
            process.kill()
    lines = answer.decode("utf-8", "replace").split("\n")
    said = complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
    match lines:
        case ["begun", ("passed" | "failed" | "timeout") as outcome, reason, *_]:
            return True, Verdict(outcome, reason), said
        case ["begun", *_]:
            return True, Verdict("failed", "ended together with its sandbox"), said
        case _:
            return False, Verdict("failed"), said


def _order(start: Start, program: str, limits: Limits) -> dict[str, object]:
    """What the warden is told. ``uid`` is new each time, for limits that count by user."""
    return {
        "program": program.encode("utf-8", "replace").decode(),  # a lone surrogate is no text
        "folder": start.folder,
        "uid": random.SystemRandom().choice(USERS) if start.apart else 0,
        "apart": start.apart,
        "alone": start.alone,
        "seconds": limits.seconds,
        "processor": limits.processor,
        "memory": limits.memory,
        "output": limits.output,
        "processes": limits.processes,
        "limits": [
            ("RLIMIT_CPU", limits.processor, limits.processor + 1),
            ("RLIMIT_AS", limits.memory, limits.memory),
            ("RLIMIT_FSIZE", limits.disk, limits.disk),
            ("RLIMIT_NPROC", limits.processes, limits.processes),
            ("RLIMIT_NOFILE", limits.files, limits.files),
            ("RLIMIT_CORE", 0, 0),
        ],
    }


def _send(end: int, content: bytes) -> None:
    try:
        while content:
            content = content[os.write(end, content) :]
    except BrokenPipeError:
        pass  # it did not start: its complaint says why


def _listen(ends: tuple[int, int], seconds: float) -> tuple[bytes, bytes]:
    """What a warden says and complains of, until it ends, says too much, or takes too long."""
    heard = dict.fromkeys(ends, b"")
    until = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for end in ends:
            selector.register(end, selectors.EVENT_READ)
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                part = os.read(key.fd, ANSWER)
                heard[key.fd] = (heard[key.fd] + part)[-ANSWER:]
                if not part:
                    selector.unregister(key.fd)
    return heard[ends[0]], heard[ends[1]]
