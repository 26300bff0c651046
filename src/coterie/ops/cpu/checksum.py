"""zlib's CRC-32, by the kernels where they are faster."""

from __future__ import annotations

import ctypes
import zlib

from torch import Tensor

from coterie.ops.cpu.library import load_library

STATUS_OK = 0


def crc32(content: Tensor, initial: int = 0) -> int:
    """``zlib.crc32`` of a contiguous tensor on the host; thread-safe."""
    if not content.is_contiguous() or not content.is_cpu:
        raise ValueError("a checksum is that of a contiguous tensor on the host")
    kernels = load_library()
    if kernels is not None and kernels.is_widest_isa():
        checksum = ctypes.c_uint32(initial)
        address, size = content.data_ptr(), content.nbytes
        if kernels.handle.coterie_crc32(address, size, ctypes.byref(checksum)) == STATUS_OK:
            return checksum.value
    return zlib.crc32(content.numpy().data, initial)
