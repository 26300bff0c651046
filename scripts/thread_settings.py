"""Times the model in the package under OpenMP's settings, on a quiet CPU and on a busy one.

    .venv/bin/python scripts/thread_settings.py [REPEATS]

It runs as a command, as a module and imported, each time in a new process. "shipped" sets nothing,
so that the package chooses; the other settings are OpenMP's own. A busy CPU runs two processes
that never wait. "of best" is the speed as a share of the best setting's, same way and same load.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

SETTINGS = {
    "shipped": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
PROGRAM = """
import coterie, time
engine, prompt = coterie.load(), "Tom has 3 boxes of 4 pens and gives away 5. How many are left?"
engine.generate(prompt)
start = time.perf_counter()
tokens = sum(len(engine.generate(prompt).tokens) for _ in range(40))
print("vanilla", tokens / (time.perf_counter() - start))
"""
BENCH = ("bench", "generate", "--policy", "vanilla", "--overwrite", "--out")
SPEED = re.compile(r"^vanilla\s+([\d.]+)", re.MULTILINE)


def main(repeats: int) -> None:
    for busy in (0, 2):
        with busy_processes(busy), tempfile.TemporaryDirectory() as folder:
            print_speeds(busy, folder, repeats)


def print_speeds(busy: int, folder: str, repeats: int) -> None:
    """A line for each way to run the program and each setting, which take turns."""
    python = (sys.executable, "-m")
    ways = {
        "command": (*python, "_coterie", *BENCH, folder),
        "module": (*python, "coterie", *BENCH, folder),
        "import": (sys.executable, "-c", PROGRAM),
    }
    for way, command in ways.items():
        speeds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(repeats):
            for name, variables in SETTINGS.items():
                speeds[name].append(tokens_per_second(command, variables))
        best = max(map(median, speeds.values()))
        for name, samples in speeds.items():
            speed = median(samples)
            load = f"{busy} busy processes"
            print(f"{load:18} {way:8} {name:11} {speed:8.0f} tokens/s {speed / best:6.2f} of best")


def tokens_per_second(command: Sequence[str], variables: dict[str, str]) -> float:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        command, env={**kept, **variables}, capture_output=True, text=True, check=True
    )
    match = SPEED.search(done.stdout)
    assert match is not None, done.stdout
    return float(match[1])


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
