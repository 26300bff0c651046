"""Checks and measures everything that needs a GPU, in under ten minutes, and writes records.

Every part runs in a process of its own, so that one that breaks the device breaks nothing else, and
within its share of the time. What it found is in ``gpu-PART.json``; at the end stands a table. The
exit status is 1 if a part failed, was stopped or left out, or found something that is wrong (not if
it is slow), 3 where there is no CUDA device. ``--dry-run`` walks every path on a CPU: tiny sizes,
kernels interpreted, times that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_DEVICE = 3
MINUTES = 9.5
# What runs, in this order: the most seconds it may take, and those kept free for it until then.
PARTS = {
    "limits": (40, 20),
    "experts checked": (90, 40),
    "routing": (75, 40),
    "experts": (190, 100),
    "forward": (150, 70),
    "offload": (150, 60),
    "answers": (100, 40),
    "tests": (200, 60),
}
KEEPING = 2.0  # seconds after which a part writes down again what it has found


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    if asked.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
        os.environ["COTERIE_CACHE"] = str(asked.out / "dry run")  # plans that mean nothing
    import torch

    if not asked.dry_run and not torch.cuda.is_available():
        print(
            f"scripts/gpu: torch {torch.__version__} sees no CUDA device; nothing was checked",
            file=sys.stderr,
        )
        return NO_DEVICE
    if asked.part is not None:
        return 0 if ran(asked.part, asked, words) else 1
    told = "dry run" if asked.dry_run else torch.cuda.get_device_name()
    print(f"{told}, CUDA {torch.version.cuda}, torch {torch.__version__}", flush=True)
    last, outcomes = time.monotonic() + 60 * asked.minutes, {}
    parts = list(asked.only or PARTS)
    for number, part in enumerate(parts):
        began = time.monotonic()
        if asked.dry_run:
            outcome = "done" if ran(part, asked, words) else "failed"
        else:
            kept = sum(PARTS[later][1] for later in parts[number + 1 :])
            outcome = apart(part, asked, min(PARTS[part][0], last - began - kept))
        outcomes[part] = outcome
        print(f"-- {part}: {outcome} in {time.monotonic() - began:.0f} s", flush=True)
    show(asked, outcomes)
    return 0 if all(outcome == "done" for outcome in outcomes.values()) else 1


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="this part (may be repeated)"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything together")
    parser.add_argument("--dry-run", action="store_true", help="every path, on a CPU")
    parser.add_argument(
        "--part", choices=PARTS, help=argparse.SUPPRESS
    )  # in this process, no table
    return parser


def apart(part: str, asked: argparse.Namespace, seconds: float) -> str:
    """Run a part in a process of its own; what became of it."""
    if seconds < 10:
        return "left out: no time"
    command = [sys.executable, __file__, "--part", part, "--out", str(asked.out)]
    file_of(part, asked).unlink(missing_ok=True)
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return "done" if running.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:  # and whatever it has started
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def ran(part: str, asked: argparse.Namespace, words: Sequence[str]) -> bool:
    """Run a part here and write its record as it goes; whether all that must be right is."""
    import torch
    from gpu_parts.found import Found

    from coterie.lab.records import make_record, write_record

    device = torch.device("cpu" if asked.dry_run else "cuda")
    named = "cpu" if asked.dry_run else torch.cuda.get_device_name()
    title, written = title_of(part, dry=asked.dry_run), float("-inf")

    def write(found: Found) -> None:
        command, facts = ["scripts/gpu", *words], dict(found.document())
        write_record(
            asked.out, make_record(title, command, found.measures, facts=facts, device=named)
        )

    def keep(found: Found) -> None:
        nonlocal written
        if time.monotonic() - written > KEEPING:
            write(found)
            written = time.monotonic()

    found = Found(keep=keep)
    found.facts["unfinished"] = True
    with found.trying(part):
        found.keep(found)
        makers()[part](device, asked.dry_run, found)
    del found.facts["unfinished"]
    write(found)
    return not found.wrong


def title_of(part: str, *, dry: bool) -> str:
    """Of its record, which is named for it."""
    return f"gpu {part}" + (" dry run" if dry else "")


def file_of(part: str, asked: argparse.Namespace) -> Path:
    return asked.out / f"{title_of(part, dry=asked.dry_run).replace(' ', '-')}.json"


def makers() -> dict[str, Callable[..., object]]:
    """By part, what measures it: (device, dry, found) -> found."""

    def of(module: str, function: str = "measure") -> Callable[..., object]:
        def make(device: object, dry: bool, found: object) -> object:
            part = getattr(import_module(f"gpu_parts.{module}"), function)
            return part(device, dry=dry, found=found)

        return make

    return {
        "limits": of("limits"),
        "experts checked": of("experts", "check"),
        "routing": of("routing"),
        "experts": of("experts"),
        "forward": of("forward"),
        "offload": of("offload"),
        "answers": of("answers"),
        "tests": of("suites"),
    }


def show(asked: argparse.Namespace, outcomes: dict[str, str]) -> None:
    """The figures of the records that this run wrote."""
    for part, outcome in outcomes.items():
        path = file_of(part, asked)
        written = path.is_file() and not outcome.startswith("left out")
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"] if written else {}
        figures = facts.get("figures", [])
        for figure in figures:
            target, met = figure["target"], {True: "ok", False: "MISSED", None: ""}[figure["met"]]
            sign = "" if target is None else f"{'<=' if figure['most'] else '>='} {target:g}"
            print(f"{figure['name']:64} {float(figure['value']):10.3f}  {sign:9} {met}")
        if outcome != "done":
            print(f"{part:64} {outcome}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
