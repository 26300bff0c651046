"""Free memory as the system reports it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable
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
    return _lowest([_available_memory(), cgroup_free_memory(), _free_addresses()])


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
        if controllers in ("", "memory"):
            files, root = CGROUP_V1 if controllers else CGROUP_V2, cgroup_root / controllers
            group = root / path.lstrip("/")
            groups = [group, *(folder for folder in group.parents if folder.is_relative_to(root))]
            free_bytes += map(files.free_memory, groups)
    return _lowest(free_bytes)


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


def _available_memory() -> int | None:
    try:
        match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _lowest(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
