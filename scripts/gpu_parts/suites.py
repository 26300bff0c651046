"""The tests of kernels and devices, and the reference folders where these are at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from gpu_parts.found import Figure, Found

ROOT = Path(__file__).parents[2]
LIMITS = {"devices agree": 60, "parity": 45, "kernels": 75}  # seconds


def measure(device: torch.device, *, dry: bool = False) -> Found:
    """Each in a process of its own. ``dry``: pytest is only found."""
    del device
    found = Found()
    pytest = ["-m", "pytest", "-q"]
    kernels = sorted(str(path) for path in (ROOT / "tests").glob("test_triton_*.py"))
    commands = {
        "devices agree": [*pytest, "--version" if dry else "tests/test_devices.py"],
        "kernels": [*pytest, *(["--version"] if dry else kernels)],
    }
    shared = Path(os.environ.get("COTERIE_SHARED") or ROOT.parent / "shared")
    sets = sorted(str(path.parent) for path in (shared / "golden").glob("*/*/reference.npz"))
    if sets and not dry:
        commands["parity"] = ["-m", "coterie.parity", *sets]
    for name, command in commands.items():
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ if dry else {**os.environ, "TRITON_INTERPRET": "0"},
                check=False,
                timeout=LIMITS[name],
                capture_output=True,
                text=True,
            )
            status, told = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            status, told = -1, f"not over after {LIMITS[name]} s"
        found.facts[name] = {"status": status, "end": told[-2000:]}
        found.figures.append(Figure(f"{name}: exit status", abs(status), 0, most=True))
    return found
