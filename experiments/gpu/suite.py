"""Checks and measures everything that needs a GPU, in some minutes, and writes records.

Each part runs in its own process and within its time limit. Its results are in ``gpu-PART.json``; a
table ends the run. The exit status is 1 if a part failed, was stopped or left out, or missed a
required figure, and 3 without a CUDA device. ``--dry-run`` runs every path on a CPU with tiny sizes
and interpreted kernels: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from experiments.records import ROOT, new_parser, save_record

NO_DEVICE = 3
MINUTES = 7.0
# Each part in order: its time limit, and the seconds reserved for it until it starts.
PARTS = {
    "limits": (40, 20),
    "experts checked": (90, 40),
    "routing": (75, 40),
    "experts": (190, 100),
    "forward": (150, 70),
    "offload": (150, 60),
    "answers": (100, 40),
}
SAVE_INTERVAL = 2.0  # seconds


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
        os.environ["COTERIE_CACHE"] = str(args.out / "dry run")  # its tuning results mean nothing
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device; nothing checked", file=sys.stderr)
        return NO_DEVICE
    if args.part is not None:
        return 0 if run_part(args.part, args, argv) else 1
    device = "dry run" if args.dry_run else torch.cuda.get_device_name()
    print(f"{device}, CUDA {torch.version.cuda}, torch {torch.__version__}", flush=True)
    deadline, outcomes = time.monotonic() + 60 * args.minutes, {}
    parts = list(args.only or PARTS)
    for number, part in enumerate(parts):
        start = time.monotonic()
        if args.dry_run:
            outcomes[part] = "done" if run_part(part, args, argv) else "failed"
        else:
            reserved = sum(PARTS[later][1] for later in parts[number + 1 :])
            limit = min(PARTS[part][0], deadline - start - reserved)
            command = [sys.executable, "-m", "experiments", "gpu", "--part", part]
            outcomes[part] = run_process(part, [*command, "--out", str(args.out)], args, limit)
        print(f"-- {part}: {outcomes[part]} in {time.monotonic() - start:.0f} s", flush=True)
    print_figures(args, outcomes)
    return 0 if all(outcome == "done" for outcome in outcomes.values()) else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("gpu", __doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; repeatable")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="every path, on a CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in this process
    return parser.parse_args(argv)


def run_process(part: str, command: list[str], args: argparse.Namespace, seconds: float) -> str:
    """Run a part's process and everything that it starts within a limit; returns the outcome."""
    if seconds < 10:
        return "left out: no time"
    record_path(part, args).unlink(missing_ok=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return "done" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_part(part: str, args: argparse.Namespace, argv: Sequence[str]) -> bool:
    """Run a part in this process and save its record as it goes; whether nothing failed."""
    import torch

    from experiments.gpu.report import PartReport

    device = torch.device("cpu" if args.dry_run else "cuda")
    name = "cpu" if args.dry_run else torch.cuda.get_device_name()
    title, last_save = record_title(part, args), float("-inf")

    def save(report: PartReport) -> None:
        facts = report.to_dict()
        save_record(args.out, title, ["gpu", *argv], report.measures, facts=facts, device=name)

    def save_sometimes(report: PartReport) -> None:
        nonlocal last_save
        if time.monotonic() - last_save > SAVE_INTERVAL:
            save(report)
            last_save = time.monotonic()

    report = PartReport(on_change=save_sometimes)
    report.facts["unfinished"] = True
    with report.attempt(part):
        save_sometimes(report)
        module, _, checked = part.partition(" ")
        function = "check" if checked else "measure"
        measure = getattr(import_module(f"experiments.gpu.{module}"), function)
        measure(device, report, dry=args.dry_run)
    del report.facts["unfinished"]
    save(report)
    return not report.failures


def record_title(part: str, args: argparse.Namespace) -> str:
    return f"gpu {part}" + (" dry run" if args.dry_run else "")


def record_path(part: str, args: argparse.Namespace) -> Path:
    return args.out / f"{record_title(part, args).replace(' ', '-')}.json"


def print_figures(args: argparse.Namespace, outcomes: dict[str, str]) -> None:
    """The figures of the records that this run wrote."""
    for part, outcome in outcomes.items():
        path = record_path(part, args)
        ran = path.is_file() and not outcome.startswith("left out")
        facts = json.loads(path.read_text(encoding="utf-8"))["facts"] if ran else {}
        for figure in facts.get("figures", []):
            target, met = figure["target"], {True: "ok", False: "MISSED", None: ""}[figure["met"]]
            sign = "<=" if figure["at_most"] else ">="
            bound = "" if target is None else f"{sign} {target:g}"
            print(f"{figure['name']:64} {float(figure['value']):10.3f}  {bound:9} {met}")
        if outcome != "done":
            print(f"{part:64} {outcome}")
