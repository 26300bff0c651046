"""What this machine is, and what it reaches: the processor, memory, disk and GPU of records."""

from __future__ import annotations

import os
import platform
import tempfile
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import torch

from coterie.keys import Key
from coterie.lab.bandwidth import read_rows, readable_rows
from coterie.lab.timing import FULL_BUDGET, TimingBudget, measure_limits, time_once
from coterie.loading.free_memory import cgroup_free_memory, free_memory
from coterie.offload.fetchers import FETCH_THREADS, ThreadedFetcher
from coterie.offload.tiers import DiskTier, ExpertFileSpan
from coterie.ops.cpu.experts import allocate

CPU = torch.device("cpu")
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd"),
    *("bf16", "i8mm", "sve"),
)
"""The sets that matrix kernels are written for, as Linux names them."""

QUICK_BUDGET = TimingBudget(rounds=3, read_bytes=64 << 20, matrix_size=256)
READ_EXPERT_BYTES = 4 << 20  # bytes of a row of the read probe, about one expert
DISK_BYTES = 96 << 20  # bytes that the disk probe writes and reads


@dataclass(frozen=True)
class Processor:
    """The processor as the system names it; None where it does not say."""

    name: Annotated[str, Key("processor")]
    vendor: Annotated[str | None, Key("vendor")]
    family: Annotated[int | None, Key("family")]
    model: Annotated[int | None, Key("model")]
    cores: Annotated[int | None, Key("cores")]
    instruction_sets: Annotated[tuple[str, ...], Key("instruction_sets")]

    @staticmethod
    def of(cpuinfo: Path = CPUINFO) -> Processor:
        """The first processor that the system lists."""
        fields = _first_processor(cpuinfo)
        flags = fields.get("flags", fields.get("Features", "")).split()
        name = fields.get("model name") or platform.processor() or platform.machine()
        numbers = [fields.get(key, "") for key in ("cpu family", "model")]
        family, model = (int(text) if text.isdecimal() else None for text in numbers)
        sets = tuple(each for each in INSTRUCTION_SETS if each in flags)
        return Processor(name, fields.get("vendor_id"), family, model, os.cpu_count(), sets)


@dataclass(frozen=True)
class HostMemory:
    """Bytes of this machine's memory; None where the system does not say."""

    total: Annotated[int | None, Key("total")]
    available: Annotated[int | None, Key("available")]  # also by the limits of this process
    group_available: Annotated[int | None, Key("control_group_available")]  # None: no limit

    @staticmethod
    def of() -> HostMemory:
        total, group = _total_memory(), cgroup_free_memory()
        # Version 1 of control groups writes "no limit" as a number beyond any memory.
        limited = group is not None and (total is None or group < total)
        return HostMemory(total, free_memory(CPU), group if limited else None)


@dataclass(frozen=True)
class Gpu:
    """A GPU and its link: bytes of memory, and bytes per second of a copy to it."""

    name: Annotated[str, Key("name")]
    capability: Annotated[str, Key("compute_capability")]
    total: Annotated[int, Key("total")]
    available: Annotated[int, Key("available")]
    link_bandwidth: Annotated[float, Key("link")]

    @staticmethod
    def of() -> Gpu | None:
        """The first GPU; None without one."""
        if not torch.cuda.is_available():
            return None
        device = torch.device("cuda:0")
        available, total = torch.cuda.mem_get_info(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = torch.cuda.get_device_name(device)
        return Gpu(name, capability, total, available, measure_link(device))


def machine_info() -> dict[str, object]:
    """System, processor, cores and memory (MiB; None if unknown), as records keep them."""
    total, processor = _total_memory(), Processor.of()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor.name,
        "family": processor.family,
        "model": processor.model,
        "cores": processor.cores,
        "memory_mib": None if total is None else total >> 20,
        "python": platform.python_version(),
    }


@cache
def quick_peak() -> Mapping[str, float]:
    """GB/s of a read and GFLOP/s of PyTorch's products, measured once in well under a second."""
    limits = measure_limits(CPU, [torch.bfloat16, torch.float32], QUICK_BUDGET)
    products = {f"{name}_gflop_per_s": x / 1e9 for name, x in limits["flops_per_second"].items()}
    return {"read_gb_per_s": limits["bytes_per_second"] / 1e9, **products}


def measure_read_bandwidth(seconds: float = 1.0, size: int = FULL_BUDGET.read_bytes) -> float:
    """Bytes per second of plain reads of ``size`` bytes: the median of about ``seconds``."""
    count = max(1, size // READ_EXPERT_BYTES)
    buffer = allocate(count, READ_EXPERT_BYTES).fill_(1)
    rows, used = readable_rows([buffer]), torch.ones(count, dtype=torch.bool)
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(time_once(lambda: read_rows(rows, used), CPU))
    return buffer.nbytes / sorted(samples)[len(samples) // 2]


def measure_disk_bandwidth(folder: Path, size: int = DISK_BYTES) -> float | None:
    """Bytes per second at which experts are fetched from a file in ``folder``, checksums included.

    The file is temporary. None where no file can be written there.
    """
    count = max(FETCH_THREADS, size // READ_EXPERT_BYTES)
    blob = os.urandom(READ_EXPERT_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".coterie-disk-") as file:
            for _ in range(count):
                file.write(blob)
            file.flush()
            os.fsync(file.fileno())
            checksums = (zlib.crc32(blob),) * count
            span = ExpertFileSpan(Path(file.name), 0, READ_EXPERT_BYTES, checksums)
            fetcher = ThreadedFetcher(DiskTier({0: span}))
            slots = allocate(count, READ_EXPERT_BYTES).zero_()
            start = time.perf_counter()
            fetcher.wait([fetcher.fetch_async(0, n, slot) for n, slot in enumerate(slots)])
            return slots.nbytes / (time.perf_counter() - start)
    except OSError:
        return None


def measure_link(device: torch.device, size: int = DISK_BYTES) -> float:
    """Bytes per second of copies from pinned host memory to a device."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = [time_once(lambda: target.copy_(source, non_blocking=True), device) for _ in range(4)]
    return size / min(seconds)


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; none where there is no such file."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        for line in first.splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
