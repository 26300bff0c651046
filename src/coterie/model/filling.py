"""From one tensor of a file to its place in memory: read, quantised, unpacked, or mapped."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.shard import Entry, read_into, rows_of
from coterie.model.spec import ModelSpec
from coterie.model.weights import PACKED, Place, is_packed, kept_wide
from coterie.naming import CoterieError
from coterie.ops.panels import unpack_expert
from coterie.quant import Format, QTensor, quantise

POPULATE_READ = 22  # madvise's, which Python does not name everywhere
CUT = "cannot be read to its end: it became shorter meanwhile, or the disk failed"
AT_ONCE = 64 << 20  # bytes of a mapped file made present in one call


@dataclass(frozen=True)
class Filling:
    """Puts each tensor of a checkpoint of ``stored`` where a model of ``kept`` has it."""

    stored: ModelSpec
    kept: ModelSpec
    weights: dict[str, Tensor]  # grows by what is mapped
    left: bool = False  # packed experts stay in their file, and nothing is read of them

    def __call__(self, descriptor: int, entry: Entry, place: Place) -> None:
        """Raises CoterieError, naming the tensor where that helps."""
        if is_packed(place.target) and self.left:
            return
        if is_packed(place.target) and self.kept.panels:
            self.weights[place.target] = mapped(descriptor, entry)
        elif is_packed(place.target):
            self._unpack(descriptor, entry, place)
        elif place.target in self.weights:
            read_tensor(descriptor, entry, place, self.weights)
        elif self.kept.expert_format is not None:
            quantise_tensor(descriptor, entry, place, self.weights, self.kept.expert_format)

    def _unpack(self, descriptor: int, entry: Entry, place: Place) -> None:
        """One expert at a time, on the device that it is for."""
        experts = place.target.removesuffix(PACKED)
        kind, spec = self.stored.panel_kind, self.stored
        size = spec.expert_stride
        blob = torch.empty(size, dtype=torch.uint8)
        for expert in range(entry.shape[0]):
            start = entry.start + expert * size
            read_into(descriptor, Entry(entry.name, entry.dtype, (size,), start), blob)
            here = blob.to(next(iter(self.weights.values())).device)
            found = unpack_expert(here, kind, hidden=spec.hidden, width=spec.expert_width)
            for name, weight in zip(("gate_up", "down"), found, strict=True):
                if isinstance(weight, QTensor):
                    self.weights[f"{experts}{name}.q"][expert].copy_(weight.q)
                    self.weights[f"{experts}{name}.scales"][expert].copy_(weight.scales)
                else:
                    self.weights[f"{experts}{name}"][expert].copy_(weight)


def read_tensor(descriptor: int, entry: Entry, place: Place, weights: Mapping[str, Tensor]) -> None:
    """What decides must be finite: a NaN there would elect experts and leave no trace in logits."""
    view = weights[place.target][place.region]
    read_into(descriptor, entry, view)
    decides = kept_wide(place.target) or place.target.endswith(".scales")
    if decides and not bool(torch.isfinite(view).all()):
        raise CoterieError(f"{entry.name} holds NaN or infinity")


def quantise_tensor(
    descriptor: int, entry: Entry, place: Place, weights: Mapping[str, Tensor], form: Format
) -> None:
    """Float weights into numbers and scales, a few megabytes of rows at a time."""
    numbers = weights[f"{place.target}.q"][place.region]
    scales = weights[f"{place.target}.scales"][place.region]
    for at, rows in rows_of(descriptor, entry):
        try:
            found = quantise(rows, form)
        except CoterieError as error:
            raise CoterieError(f"{entry.name} {error}") from None
        numbers[at].copy_(found.q)
        scales[at].copy_(found.scales)


def mapped(descriptor: int, entry: Entry) -> Tensor:
    """The tensor's bytes as they lie in the file, present in memory when this returns.

    They are the system's cache of the file: every process that maps it has the same. The map is
    private, so that even a write into it would not reach the file. A file that is made shorter
    while it is mapped ends the process (SIGBUS) when what is gone is read.
    """
    end = entry.start + entry.size
    try:
        memory = mmap.mmap(
            descriptor, end, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    except ValueError:  # the file ends before
        raise CoterieError(CUT) from None
    # Where the system's cache keeps files in large pieces this finds huge pages; elsewhere nothing.
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    make_present(memory, end)
    whole = torch.frombuffer(memory, dtype=torch.uint8, offset=entry.start, count=entry.size)
    return whole.view(entry.shape)


def make_present(memory: mmap.mmap, end: int) -> None:
    """Read in what is not in the system's cache, and enter all of it into the page table."""
    try:
        for start in range(0, end, AT_ONCE):
            memory.madvise(POPULATE_READ, start, min(AT_ONCE, end - start))
    except OSError as error:
        if error.errno in (errno.EFAULT, errno.EIO):
            raise CoterieError(CUT) from None
        # A system without that advice: touching each page does the same, less quickly.
        torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE].sum()
