"""Checks the engine on a CUDA device against the CPU, times it there, and writes records.

Three steps: the reference folders that are at hand (scripts/parity), the tests that compare devices
(tests/test_devices.py), and scripts/bench on the device. Every step runs even if one before it
fails; the exit status is 1 if any did, 3 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from coterie.results import record, write_record

ROOT = Path(__file__).parents[1]
NO_DEVICE = 3


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    asked = parser.parse_args(words)
    if not torch.cuda.is_available():
        print(
            f"scripts/gpu: torch {torch.__version__} sees no CUDA device; nothing was checked",
            file=sys.stderr,
        )
        return NO_DEVICE
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    passed = {name: done(command) for name, command in steps(asked.out).items()}
    content = record(
        "gpu checks", ["scripts/gpu", *words], [], facts={"passed": passed}, device=device
    )
    print(write_record(asked.out, content))
    return 0 if all(passed.values()) else 1


def steps(out: Path) -> dict[str, list[str]]:
    """What is run, by name; parity only where reference folders are."""
    python = sys.executable
    coterie = [python, "-m", "coterie"]
    found = {
        "devices agree": [python, "-m", "pytest", "tests/test_devices.py"],
        "bench": [*coterie, "bench", "generate", "--device", "cuda", "--out", str(out)],
    }
    shared = Path(os.environ.get("COTERIE_SHARED") or ROOT.parent / "shared")
    sets = sorted(str(path.parent) for path in (shared / "golden").glob("*/*/reference.npz"))
    if not sets:
        print("scripts/gpu: no reference folders here (COTERIE_SHARED): parity is not checked")
        return found
    return {"parity": [python, "-m", "coterie.parity", *sets], **found}


def done(command: Sequence[str]) -> bool:
    print("+", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
