"""Host memory that a GPU reads by itself: of exactly the size that was asked for."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from coterie.naming import CoterieError

PORTABLE = 1  # cudaHostRegisterPortable: for every GPU of the machine


def pinned(count: int, size: int, device: torch.device) -> Tensor:
    """Uninitialised [count, size] uint8, given back to the system when nobody has it any more and
    the device, which copies out of it, has come to rest.

    Raises CoterieError where so much cannot be pinned. PyTorch's own pinned memory comes in powers
    of two and is never given back.
    """
    told = f"{count} experts of {size:,} bytes cannot be pinned in host memory"
    try:
        memory = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CoterieError(f"{told} ({error.strerror})") from None
    with suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    held = np.frombuffer(memory, dtype=np.uint8)
    address = held.ctypes.data
    outcome = int(_cuda().cudaHostRegister(address, held.nbytes, PORTABLE))
    if outcome:
        # CUDA would tell of this error once more, to whoever asks next.
        with suppress(RuntimeError):
            torch.zeros(1, device=device)
        raise CoterieError(f"{told} (CUDA error {outcome}); give --host-memory less")
    # The array goes before the memory under it does.
    weakref.finalize(held, _let_go, address, device).atexit = False
    return torch.from_numpy(held).view(count, size)


def _let_go(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    _cuda().cudaHostUnregister(address)


def _cuda():  # a module that is built into PyTorch, where it has CUDA
    found = torch.cuda.cudart()
    assert found is not None
    return found
