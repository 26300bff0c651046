"""Free memory as the system reports it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

CGROUP_FILE = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Free bytes, including file caches; None if the system does not report them.

    On the host, the limits of this process and of its control group count if they are lower.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_available_memory(Path("/proc/meminfo")), cgroup_free_memory(), _free_addresses()]
    return min((limit for limit in limits if limit is not None), default=None)


def _free_addresses() -> int | None:
    """Bytes that ``ulimit -v`` leaves; None without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used_pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - used_pages * resource.getpagesize())


def cgroup_free_memory(
    cgroup_file: Path = CGROUP_FILE, cgroup_root: Path = CGROUP_ROOT
) -> int | None:
    """Bytes that the limits of this process's control group and its parents leave."""
    try:
        lines = cgroup_file.read_text().splitlines()
    except OSError:
        return None
    free_bytes = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        files = CGROUP_V2 if controllers == "" else CGROUP_V1
        free_bytes += [
            files.free_memory(folder)
            for folder in _cgroup_and_parents(cgroup_root / controllers, path)
        ]
    return min((free for free in free_bytes if free is not None), default=None)


@dataclass(frozen=True)
class CgroupFiles:
    """File names of one version of control groups, and the reclaimable entries of memory.stat."""

    limit: str
    usage: str
    cached_pattern: str

    def free_memory(self, folder: Path) -> int | None:
        """None if there is no such group, or no limit."""
        try:
            limit = int((folder / self.limit).read_text())
            usage = int((folder / self.usage).read_text())
            stat = (folder / "memory.stat").read_text()
        except (OSError, ValueError):  # "max" means no limit
            return None
        cached = sum(int(size) for size in re.findall(self.cached_pattern, stat, re.M))
        return max(0, limit - usage + cached)


CGROUP_V1 = CgroupFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_(?:in)?active_file (\d+)"
)
CGROUP_V2 = CgroupFiles("memory.max", "memory.current", r"^(?:in)?active_file (\d+)")


def _cgroup_and_parents(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and its parents below the root."""
    own_folder = root / path.lstrip("/")
    yield own_folder
    yield from (folder for folder in own_folder.parents if folder.is_relative_to(root))


def _available_memory(path: Path) -> int | None:
    try:
        match = re.search(r"MemAvailable:\s*(\d+) kB", path.read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
