"""The tests of kernels and devices, and the reference folders where these are at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_parts.found import Figure, Found

ROOT = Path(__file__).parents[2]
LIMITS = {"devices agree": 75, "parity": 45, "kernels": 75}  # seconds


def measure(device: torch.device, *, dry: bool = False, found: Found | None = None) -> Found:
    """Each in a process of its own. ``dry``: pytest is only found."""
    found = found or Found()
    pytest = ["-m", "pytest", "-q"]
    kernels = sorted(str(path) for path in (ROOT / "tests").glob("test_triton_*.py"))
    if find_spec("xdist") is not None and not dry:  # every variant of a kernel is compiled
        pytest += ["-n", str(min(8, os.cpu_count() or 1))]
    commands: dict[str, list[str]] = {}
    if sets := reference_sets():
        on = f"--device={device.type}"
        commands["parity"] = ["-m", "coterie.lab.parity", on, *(sets[:1] if dry else sets)]
    else:
        found.facts["parity"] = "no reference folders here: set COTERIE_SHARED"
    commands["devices agree"] = [*pytest, "--version" if dry else "tests/engine/test_devices.py"]
    commands["kernels"] = [*pytest, *(["--version"] if dry else kernels)]
    for name, command in commands.items():
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(dry=dry),
                check=False,
                timeout=LIMITS[name],
                capture_output=True,
                text=True,
            )
            status, told = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            status, told = -1, f"not over after {LIMITS[name]} s"
        found.facts[name] = {"status": status, "end": told[-2000:]}
        found.judge(Figure(f"{name}: exit status", abs(status), 0, most=True, must=True))
    return found


def environment(*, dry: bool) -> dict[str, str]:
    """This one's, where the package is found and kernels run as they were asked to."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return found if dry else {**found, "TRITON_INTERPRET": "0"}


def reference_sets() -> list[str]:
    """Folders with a reference, beside the repository or in it."""
    named = os.environ.get("COTERIE_SHARED")
    places = [Path(named)] if named else [ROOT / "shared", ROOT.parent / "shared"]
    found = (path.parent for place in places for path in place.glob("golden/*/*/reference.npz"))
    return sorted(map(str, found))
