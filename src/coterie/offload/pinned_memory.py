"""Pinned host memory of an exact size, which a GPU can copy from asynchronously."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from coterie.errors import OffloadError

HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU of the machine


def allocate_pinned(count: int, expert_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised pinned memory [count, expert_bytes] uint8.

    It is returned to the system once no tensor refers to it and the device is idle. PyTorch's own
    pinned memory is rounded up to powers of two and never returned. Raises OffloadError if the
    memory cannot be pinned.
    """
    message = f"{count} experts of {expert_bytes:,} bytes cannot be pinned in host memory"
    try:
        mapping = mmap.mmap(-1, count * expert_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OffloadError(f"{message} ({error.strerror})") from None
    with suppress(OSError, AttributeError):  # a system without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(mapping, dtype=np.uint8)
    address = buffer.ctypes.data
    error_code = int(_cudart().cudaHostRegister(address, buffer.nbytes, HOST_REGISTER_PORTABLE))
    if error_code:
        # CUDA reports this error once more to the next call, which is this one.
        with suppress(RuntimeError):
            torch.zeros(1, device=device)
        raise OffloadError(f"{message} (CUDA error {error_code}); choose a smaller `host_memory`")
    # The finalizer runs before the mapping under the array is freed.
    weakref.finalize(buffer, _unregister, address, device).atexit = False
    return torch.from_numpy(buffer).view(count, expert_bytes)


def _unregister(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    _cudart().cudaHostUnregister(address)


def _cudart():  # a module built into PyTorch with CUDA
    cudart = torch.cuda.cudart()
    assert cudart is not None
    return cudart
