"""Host memory that a GPU reads by itself: of exactly the size that was asked for."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from coterie.errors import CoterieError

HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: for every GPU of the machine


def allocate_pinned(count: int, expert_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised [count, size] uint8, given back to the system when nobody has it any more and
    the device, which copies out of it, has come to rest.

    Raises CoterieError where so much cannot be pinned. PyTorch's own pinned memory comes in powers
    of two and is never given back.
    """
    message = f"{count} experts of {expert_bytes:,} bytes cannot be pinned in host memory"
    try:
        mapping = mmap.mmap(-1, count * expert_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CoterieError(f"{message} ({error.strerror})") from None
    with suppress(OSError, AttributeError):  # a system without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(mapping, dtype=np.uint8)
    address = buffer.ctypes.data
    error_code = int(_cudart().cudaHostRegister(address, buffer.nbytes, HOST_REGISTER_PORTABLE))
    if error_code:
        # CUDA would tell of this error once more, to whoever asks next.
        with suppress(RuntimeError):
            torch.zeros(1, device=device)
        raise CoterieError(f"{message} (CUDA error {error_code}); give --host-memory less")
    # The array goes before the memory under it does.
    weakref.finalize(buffer, _unregister, address, device).atexit = False
    return torch.from_numpy(buffer).view(count, expert_bytes)


def _unregister(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    _cudart().cudaHostUnregister(address)


def _cudart():  # a module that is built into PyTorch, where it has CUDA
    cudart = torch.cuda.cudart()
    assert cudart is not None
    return cudart
