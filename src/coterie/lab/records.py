"""Records of measurements: the command, the machine, the commit and all samples."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from coterie.files import atomic_write
from coterie.lab.machine import machine_info, quick_peak

RECORD_TYPES: Mapping[str, type] = {
    "title": str,
    "command": list,
    "when": str,
    "commit": str,
    "versions": dict,
    "measures": list,
    "facts": dict,
}
PACKAGES = ("coterie", "torch", "triton", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Measurement:
    """Repeated readings of one quantity, in the order of measurement."""

    name: str
    unit: str
    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"measurement {self.name!r} has no samples")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range; the full range if there are fewer than four samples."""
        if len(self.samples) < 4:
            return max(self.samples) - min(self.samples)
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "spread": self.spread,
            "samples": list(self.samples),
        }


def measurements_ms(policy: str, samples: Mapping[str, Sequence[float]]) -> list[Measurement]:
    """Measurements in ms, named by policy and key, of samples in seconds."""
    return [
        Measurement(f"{policy} {name}", "ms", tuple(seconds * 1e3 for seconds in values))
        for name, values in samples.items()
    ]


def median_ratio(samples: Sequence[float], references: Sequence[float]) -> float:
    """The median ratio of paired samples."""
    return statistics.median(a / b for a, b in zip(samples, references, strict=True))


def make_record(
    title: str,
    command: Sequence[str],
    measurements: Sequence[Measurement],
    *,
    facts: Mapping[str, object] | None = None,
    device: str = "cpu",
) -> dict[str, object]:
    """A record as a JSON object; ``facts`` holds results other than samples."""
    return {
        "title": title,
        "command": list(command),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": {**machine_info(), "device": device, "peak": dict(quick_peak())},
        "versions": package_versions(),
        "measures": [measurement.to_dict() for measurement in measurements],
        "facts": dict(facts or {}),
    }


def is_record(content: Mapping[str, Any]) -> bool:
    """Whether all that ``make_record`` writes is there, and has its type."""
    machine = content.get("machine")
    return (
        all(isinstance(content.get(key), kind) for key, kind in RECORD_TYPES.items())
        and isinstance(machine, dict)
        and {"processor", "cores", "device"} <= set(machine)
        and isinstance(machine.get("memory_mib"), int | None)
    )


def record_path(folder: Path, title: str) -> Path:
    """The file of a record with this title."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.json"


def write_record(folder: Path, content: Mapping[str, object]) -> Path:
    """Writes ``<title>.json`` in ``folder`` atomically and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(folder, str(content["title"]))
    write_json(path, content)
    return path


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON file atomically."""
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def git_commit(folder: Path | None = None) -> str:
    """The commit of the repository of ``folder`` (default: this file), "+changes" if dirty."""
    directory = folder or Path(__file__).parent
    head = _git(directory, "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+changes" if _git(directory, "status", "--porcelain", "-uno") else "")


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that affect measurements."""
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
