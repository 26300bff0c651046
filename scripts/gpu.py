"""Checks and measures everything that needs a GPU, in under ten minutes, and writes records.

Every part runs in a process of its own, so that one that breaks the device breaks nothing else, and
within its share of the time. What it found is in ``gpu-PART.json``; at the end stands a table. The
exit status is 1 if a part failed, 3 where there is no CUDA device. ``--dry-run`` walks every path
on a CPU: tiny sizes, kernels interpreted, times that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_DEVICE = 3
MINUTES = 9.5
# What runs, in this order, and the most seconds it may take.
PARTS = {
    "limits": 40,
    "experts checked": 90,
    "routing": 75,
    "experts": 200,
    "forward": 150,
    "answers": 100,
    "tests": 185,
}


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
    for part in asked.only or PARTS:
        began = time.monotonic()
        if asked.dry_run:
            outcome = "done" if ran(part, asked, words) else "failed"
        else:
            outcome = apart(part, asked, min(PARTS[part], last - began))
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
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return "done" if done.returncode == 0 else "failed"


def ran(part: str, asked: argparse.Namespace, words: Sequence[str]) -> bool:
    """Run a part here and write its record, also of what was found before it failed."""
    import torch

    from coterie.results import record, write_record

    device = torch.device("cpu" if asked.dry_run else "cuda")
    measures, facts, good = [], {}, True
    try:
        found = makers()[part](device, asked.dry_run)
        measures, facts = found.measures, dict(found.document())
    except Exception as error:
        traceback.print_exc()
        facts, good = {"failed": f"{type(error).__name__}: {error}"[:2000]}, False
    title = title_of(part, dry=asked.dry_run)
    named = "cpu" if asked.dry_run else torch.cuda.get_device_name()
    content = record(title, ["scripts/gpu", *words], measures, facts=facts, device=named)
    write_record(asked.out, content)
    return good


def title_of(part: str, *, dry: bool) -> str:
    """Of its record, which is named for it."""
    return f"gpu {part}" + (" dry run" if dry else "")


def makers() -> dict[str, Callable[..., object]]:
    """By part, what measures it: (device, dry) -> Found."""

    def of(module: str, function: str = "measure") -> Callable[..., object]:
        def make(device: object, dry: bool) -> object:
            return getattr(import_module(f"gpu_parts.{module}"), function)(device, dry=dry)

        return make

    return {
        "limits": of("limits"),
        "experts checked": of("experts", "check"),
        "routing": of("routing"),
        "experts": of("experts"),
        "forward": of("forward"),
        "answers": of("answers"),
        "tests": of("suites"),
    }


def show(asked: argparse.Namespace, outcomes: dict[str, str]) -> None:
    """The figures of the records that this run wrote."""
    for part, outcome in outcomes.items():
        path = asked.out / f"{title_of(part, dry=asked.dry_run).replace(' ', '-')}.json"
        written = outcome in ("done", "failed") and path.is_file()
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"] if written else {}
        figures = facts.get("figures", [])
        for figure in figures:
            target, met = figure["target"], {True: "ok", False: "MISSED", None: ""}[figure["met"]]
            sign = "" if target is None else f"{'<=' if figure['most'] else '>='} {target:g}"
            print(f"{figure['name']:64} {figure['value']:10.3f}  {sign:9} {met}")
        if outcome != "done":
            print(f"{part:64} {outcome}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
