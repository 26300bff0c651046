"""Lack of memory, which Python, PyTorch and the system report in different ways."""

import errno
import re
import traceback

import torch

from coterie.offload.capacity import format_bytes

REPORTS = re.compile(
    r"DefaultCPUAllocator|not enough memory|[Oo]ut of memory|[Cc]annot allocate memory"
    r"|can't allocate memory|can't start new thread|std::bad_alloc"
)
REQUEST = re.compile(
    r"(?:allocate|Tried to allocate|Unable to allocate) ([\d.]+) ?(bytes|[KMGTPE]iB)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, or a thread for want of memory, could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and REPORTS.search(str(error)) is not None


def out_of_memory_message(error: BaseException) -> str:
    """One line: how much was wanted, if that is known, and by which part of the package."""
    wanted = "a new thread" if "thread" in str(error) else "more memory than is free"
    if match := REQUEST.search(str(error)):
        is_plain = match[2] == "bytes"
        wanted = format_bytes(int(match[1])) if is_plain else f"{match[1]} {match[2]}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/coterie/" in f.filename and not f.name.startswith("<")]
    place = f" in {ours[-1].filename.rpartition('/coterie/')[2]}: {ours[-1].name}" if ours else ""
    return f"out of memory: {wanted} was wanted{place}"
