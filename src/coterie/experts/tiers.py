"""Where all experts lie, for a store that keeps only some of them: whole blobs, fetched by name."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from coterie.naming import CoterieError


class Tier(Protocol):
    """A memory that holds every expert of every layer."""

    def fetch(self, layer: int, expert: int, into: Tensor) -> None:
        """All bytes of an expert into ``into`` [bytes] uint8, or a CoterieError; from any thread,
        several at once."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Every expert in host memory: of each layer [E, bytes of one] uint8."""

    blobs: Mapping[int, Tensor]

    def fetch(self, layer: int, expert: int, into: Tensor) -> None:
        into.copy_(self.blobs[layer][expert])


@dataclass(frozen=True)
class Blobs:
    """A layer's experts in a file, one after the other from ``start`` on."""

    path: Path
    start: int
    size: int  # bytes from one expert to the next
    checksums: tuple[int, ...]  # CRC-32 of each expert


@dataclass(frozen=True)
class OnDisk:
    """Every expert in files. What was read is let go from the system's cache: there is one cache
    of experts, the store's own, and its budget is what was asked for."""

    layers: Mapping[int, Blobs]

    def fetch(self, layer: int, expert: int, into: Tensor) -> None:
        """Raises CoterieError for a file that is gone, cut off, or not what was written."""
        blobs = self.layers[layer]
        what = f"{blobs.path}: expert {expert} of layer {layer}"
        view, at = into.numpy().data, blobs.start + expert * blobs.size
        try:
            with blobs.path.open("rb", buffering=0) as file:
                file.seek(at)
                done = 0
                while done < blobs.size:
                    got = file.readinto(view[done:])
                    if not got:
                        raise CoterieError(f"{what} ends after {done} of {blobs.size} bytes")
                    done += got
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), at, blobs.size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CoterieError(f"{what} cannot be read ({error.strerror})") from None
        if zlib.crc32(view) != blobs.checksums[expert]:
            raise CoterieError(f"{what} is not what was written; copy or convert the model again")
