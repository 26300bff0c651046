"""Many clients at once against `coterie serve`, some of them hostile, for minutes.

    python -m experiments soak --minutes 10

Clients stream and do not, hang up, read slowly, and send malformed, oversized and badly encoded
bodies. Every whole answer is compared with the answer to the same request sent alone before. A
process of its own measures /health. The exit status is 1 if an answer was lost or mixed up, a row
hung, memory grew, or the 99th percentile of /health was 100 ms or more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, quantiles

from experiments.records import ROOT, new_parser, save_record

CHAT = "/v1/chat/completions"
QUESTIONS = [
    f"{name} has {a} boxes of {b} pens and gives away {c}. How many pens are left?"
    for name, a, b, c in [("Tom", 3, 4, 5), ("Ann", 7, 2, 3), ("Ben", 5, 6, 8), ("Eva", 9, 3, 4)]
] + ["Solve 3x + 4 = 19 for x.", "Write a Python function that doubles each number of a list."]
VARIANTS: list[dict[str, object]] = [
    {},
    {"policy": "des-vote:beta=0.3"},
    {"temperature": 1.0, "seed": 5},
    {"stop": [" are", "\n"]},
]
ACTIONS = {
    "whole": 30, "stream": 28, "frames": 6, "hang up while streaming": 10, "hang up": 6,
    "slow reader": 6, "malformed": 4, "bad UTF-8": 4, "unknown field": 3, "oversized": 3,
}  # fmt: skip
REFUSED = {"malformed": 400, "bad UTF-8": 400, "unknown field": 400, "oversized": 413}
HEALTH_LIMIT, GROWTH_LIMIT = 0.1, 0.05  # seconds; share of the memory after the first quarter
SECONDS_PER_ANSWER = 120.0


@dataclass
class Tally:
    """What the clients saw."""

    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of whole answers
    memory: list[int] = field(default_factory=list)  # bytes, once a second


def main(argv: Sequence[str]) -> int:
    parser = new_parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.probe:
        return probe(options.probe, 60 * options.minutes)
    port = free_port()
    with start_server(port) as server:
        try:
            facts = asyncio.run(soak(port, server.pid, options))
        finally:
            server.terminate()
            facts_of_end = server.wait(30)
    facts["exit status"] = facts_of_end
    command = ["soak", "--minutes", f"{options.minutes:g}", "--clients", str(options.clients)]
    path = save_record(options.out, "Server soak", command, facts=facts)
    print(json.dumps(facts, indent=1), path, sep="\n")
    return 0 if facts["passed"] else 1


def start_server(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "coterie", "serve", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    for _ in range(600):
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
            return server
        time.sleep(0.1)
    server.kill()
    raise SystemExit("the server did not start")


async def soak(port: int, process: int, options: argparse.Namespace) -> dict[str, object]:
    """The facts of one run."""
    bodies = [body(question, **extra) for question in QUESTIONS for extra in VARIANTS]
    expected = [text_of(*await exchange(port, content)) for content in bodies]
    end = time.monotonic() + 60 * options.minutes
    clients, tally = Clients(port, tuple(bodies), tuple(expected), end), Tally()
    words = ["-m", "experiments", "soak", "--probe", str(port), "--minutes", str(options.minutes)]
    prober = await asyncio.create_subprocess_exec(
        sys.executable, *words, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    draws = [random.Random(f"{options.seed} {number}") for number in range(options.clients)]
    runs = [clients.run(draw, tally) for draw in draws]
    await asyncio.gather(watch_memory(process, tally, end), *runs)
    health = json.loads((await prober.communicate())[0])
    idle = await wait_until_idle(port)
    return summary(tally, health, idle=idle, minutes=options.minutes)


def summary(
    tally: Tally, health: dict[str, float], *, idle: bool, minutes: float
) -> dict[str, object]:
    quarter = max(1, len(tally.memory) // 4)
    early, late = mean(tally.memory[quarter : 2 * quarter]), mean(tally.memory[-quarter:])
    growth = late / early - 1
    passed = not tally.faults and idle and growth < GROWTH_LIMIT and health["p99"] < HEALTH_LIMIT
    return {
        "passed": passed,
        "minutes": minutes,
        "requests": sum(tally.answers.values()),
        "by kind": dict(sorted(tally.answers.items())),
        "faults": tally.faults[:20],
        "fault count": len(tally.faults),
        "rows free at the end": idle,
        "answer seconds p50, p99": percentiles(tally.seconds),
        "health": health,
        "memory bytes early, late": [round(early), round(late)],
        "memory growth": round(growth, 4),
    }


@dataclass(frozen=True)
class Clients:
    """What all clients send, with the answers to it alone, until ``end``."""

    port: int
    bodies: tuple[bytes, ...]
    expected: tuple[str, ...]
    end: float

    async def run(self, draw: random.Random, tally: Tally) -> None:
        """One client: request after request, of kinds drawn at random."""
        while time.monotonic() < self.end:
            (action,) = draw.choices(list(ACTIONS), list(ACTIONS.values()))
            start, fault = time.monotonic(), None
            try:
                async with asyncio.timeout(SECONDS_PER_ANSWER):
                    if await self.is_answered(draw, action):
                        tally.seconds.append(time.monotonic() - start)
            except (OSError, TimeoutError, ValueError, IndexError, KeyError) as error:
                fault = f"{action}: {type(error).__name__}: {error}"
            tally.answers[action] += 1
            tally.faults += [] if fault is None else [fault[:300]]

    async def is_answered(self, draw: random.Random, action: str) -> bool:
        """Whether there is an answer; ValueError if it, or a refusal, is not as it must be."""
        index = draw.randrange(len(self.bodies))
        content, expected = self.bodies[index], self.expected[index]
        document, port = json.loads(content), self.port
        if action in REFUSED:
            status, answer = await exchange(port, bad_body(action, document, draw))
            if status != REFUSED[action] or b'"error"' not in answer or b"Traceback" in answer:
                raise ValueError(f"{status} {answer[:200]!r}")
            return False
        if action == "hang up":
            await exchange(port, content, leave_after=draw.uniform(0, 0.5))
            return False
        if action == "whole":
            text = text_of(*await exchange(port, content))
        else:
            wanted = action in ("frames", "slow reader")
            frames = {"coterie": {"votes": draw.random() < 0.5}} if wanted else None
            content = json.dumps(document | {"stream": True, "stream_options": frames}).encode()
            if action == "hang up while streaming":
                await exchange(port, content, leave_after=draw.uniform(0, 1.0))
                return False
            pause = 0.05 if action == "slow reader" else 0.0
            text = streamed_text(*await exchange(port, content, pause=pause))
        if text != expected:
            raise ValueError(f"expected {expected!r}, got {text!r}")
        return True


def body(question: str, **extra: object) -> bytes:
    messages = [{"role": "user", "content": question}]
    return json.dumps({"messages": messages, "max_tokens": 96, **extra}).encode()


def bad_body(action: str, document: dict[str, object], draw: random.Random) -> bytes:
    content = json.dumps(document).encode()
    if action == "malformed":
        return content[: draw.randrange(1, len(content))]
    if action == "bad UTF-8":
        return content.replace(b'"user"', b'"us\xff\xfeer"')
    if action == "oversized":
        return b'{"messages": "' + b"a" * (5 << 20) + b'"}'
    return json.dumps(document | {"no_such_field": 1}).encode()


async def exchange(
    port: int, content: bytes, *, pause: float = 0.0, leave_after: float | None = None
) -> tuple[int, bytes]:
    """The status and the body of an answer; ``leave_after`` closes the connection instead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            return 0, b""
        parts = []
        while part := await reader.read(200 if pause else 65536):
            parts.append(part)
            await asyncio.sleep(pause)
    finally:
        writer.transport.abort()
    header, _, rest = b"".join(parts).partition(b"\r\n\r\n")
    chunked = b"transfer-encoding: chunked" in header.lower()
    return int(header.split(b" ", 2)[1]), dechunked(rest) if chunked else rest


def dechunked(content: bytes) -> bytes:
    """The body of a chunked response; ValueError if its end is missing."""
    parts, ended = [], False
    while not ended:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        parts.append(content[:length])
        content, ended = content[length + 2 :], length == 0
    return b"".join(parts)


def text_of(status: int, answer: bytes) -> str:
    if status != 200:
        raise ValueError(f"{status} {answer[:200]!r}")
    return json.loads(answer)["choices"][0]["message"]["content"]


def streamed_text(status: int, answer: bytes) -> str:
    events = answer.decode().strip().split("\n\n")
    if status != 200 or events[-1] != "data: [DONE]":
        raise ValueError(f"{status}, ends in {events[-1][:200]!r}")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def watch_memory(process: int, tally: Tally, end: float) -> None:
    pages = Path(f"/proc/{process}/statm")
    while time.monotonic() < end:
        resident = int(pages.read_text().split()[1])
        tally.memory.append(resident * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(1)


async def wait_until_idle(port: int) -> bool:
    """Whether no request is left soon after the last client."""
    for _ in range(100):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as answer:
            state = json.loads(answer.read())
        if state["running"] == state["waiting"] == 0:
            return True
        await asyncio.sleep(0.1)
    return False


def probe(port: str, seconds: float) -> int:
    """Prints the times of /health as JSON: connections of their own, twenty a second."""
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
            answer.read()
        times.append(time.perf_counter() - start)
        time.sleep(0.05)
    p50, p99 = percentiles(times)
    print(json.dumps({"p50": p50, "p99": p99, "max": round(max(times), 4), "probes": len(times)}))
    return 0


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th."""
    cuts = quantiles(values, n=100) if len(values) > 1 else [*values, 0.0] * 50
    return round(cuts[49], 4), round(cuts[98], 4)


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]
