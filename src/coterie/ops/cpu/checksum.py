"""The checksum of bytes: zlib's CRC-32, by the kernels where they are faster."""

from __future__ import annotations

import ctypes
import zlib

from torch import Tensor

from coterie.ops.cpu.library import library

DONE = 0


def crc32(content: Tensor, before: int = 0) -> int:
    """``zlib.crc32`` of contiguous bytes on the host; several threads may ask at once."""
    found = library()
    if found is not None and found.wide():
        sum_ = ctypes.c_uint32(before)
        place, size = content.data_ptr(), content.nbytes
        if found.handle.coterie_crc32(place, size, ctypes.byref(sum_)) == DONE:
            return sum_.value
    return zlib.crc32(content.numpy().data, before)
