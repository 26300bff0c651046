"""How much memory can still be had, as the system tells it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

GROUPS = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had there, caches of files counted in; None where nobody tells.

    On the host, what this process's group may still take where that is less than the machine has.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = [_available(Path("/proc/meminfo")), group_room()]
    return min((one for one in told if one is not None), default=None)


def group_room(groups: Path = GROUPS, mounted: Path = MOUNTED) -> int | None:
    """What the limits of this process's control group and of those around it leave."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = SECOND if controllers == "" else FIRST
        found += [names.room(folder) for folder in _around(mounted / controllers, path)]
    return min((room for room in found if room is not None), default=None)


@dataclass(frozen=True)
class Names:
    """How a version of control groups calls its files, and the pages of files in ``memory.stat``.

    These go when somebody wants memory.
    """

    limit: str
    usage: str
    cached: str

    def room(self, folder: Path) -> int | None:
        """None where there is no such group, or no limit."""
        try:
            limit = int((folder / self.limit).read_text())
            usage = int((folder / self.usage).read_text())
            stat = (folder / "memory.stat").read_text()
        except (OSError, ValueError):  # "max" is no number, and no limit
            return None
        cached = sum(int(size) for size in re.findall(self.cached, stat, re.M))
        return max(0, limit - usage + cached)


FIRST = Names("memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_(?:in)?active_file (\d+)")
SECOND = Names("memory.max", "memory.current", r"^(?:in)?active_file (\d+)")


def _around(mounted: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it. In a container its own may be the uppermost."""
    inner = mounted / path.lstrip("/")
    yield inner
    yield from (folder for folder in inner.parents if folder.is_relative_to(mounted))


def _available(path: Path) -> int | None:
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", path.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
