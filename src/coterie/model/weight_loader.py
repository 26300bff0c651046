"""Loading one tensor of a file: reading, quantising, unpacking or mapping it."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import CheckpointError, CoterieError
from coterie.model.safetensors_file import TensorEntry, read_into, read_rows
from coterie.model.spec import ModelSpec
from coterie.model.weights import (
    HEAD,
    MAPPED_HEAD,
    PACKED_NAME,
    TensorTarget,
    is_packed,
    quant_format,
)
from coterie.ops.packed_layout import unpack_expert
from coterie.quantization import QTensor, QuantFormat, quantize

POPULATE_READ = 22  # MADV_POPULATE_READ, which not every Python version defines
TRUNCATED_FILE = "cannot be read to its end: it became shorter while being read, or the disk failed"
POPULATE_CHUNK = 64 << 20  # bytes of a mapped file read per call


@dataclass(frozen=True)
class WeightLoader:
    """Converts tensors of a checkpoint (``stored_spec``) to a model's (``loaded_spec``)."""

    stored_spec: ModelSpec
    loaded_spec: ModelSpec
    weights: dict[str, Tensor]  # mapped tensors are added
    skip_packed: bool = False  # do not read packed experts

    def __call__(self, descriptor: int, entry: TensorEntry, target: TensorTarget) -> None:
        """Loads one tensor. Raises CheckpointError if that fails."""
        if is_packed(target.weight) and self.skip_packed:
            return
        if is_packed(target.weight) and self.loaded_spec.panels:
            self.weights[target.weight] = map_tensor(descriptor, entry)
        elif is_packed(target.weight):
            self._unpack(descriptor, entry, target)
        else:
            form = quant_format(self.loaded_spec, target.weight)
            if form is not None and self._is_mapped_head(entry, target):
                del self.weights[HEAD]
                self.weights[MAPPED_HEAD] = map_tensor(descriptor, entry, populate=False)
            elif target.weight in self.weights:
                read_tensor(descriptor, entry, target, self.weights)
            if form is not None and quant_format(self.stored_spec, target.weight) is None:
                quantise_tensor(descriptor, entry, target, self.weights, form)

    def _is_mapped_head(self, entry: TensorEntry, target: TensorTarget) -> bool:
        """Whether this is a head that can stay in its file: few rows of it are ever read."""
        if target.weight != HEAD or entry.start % entry.dtype.itemsize:
            return False
        head = self.weights[HEAD]
        return head.device.type == "cpu" and head.dtype == entry.dtype

    def _unpack(self, descriptor: int, entry: TensorEntry, target: TensorTarget) -> None:
        """Unpacks one expert at a time, on the target device."""
        experts = target.weight.removesuffix(PACKED_NAME)
        kind, spec = self.stored_spec.panel_kind, self.stored_spec
        size = spec.expert_stride
        blob = torch.empty(size, dtype=torch.uint8)
        for expert in range(entry.shape[0]):
            read_into(descriptor, entry.part((size,), expert), blob)
            device_blob = blob.to(next(iter(self.weights.values())).device)
            unpacked = unpack_expert(device_blob, kind, hidden=spec.hidden, width=spec.expert_width)
            for name, weight in zip(("gate_up", "down"), unpacked, strict=True):
                if isinstance(weight, QTensor):
                    self.weights[f"{experts}{name}.q"][expert].copy_(weight.q)
                    self.weights[f"{experts}{name}.scales"][expert].copy_(weight.scales)
                else:
                    self.weights[f"{experts}{name}"][expert].copy_(weight)


def read_tensor(
    descriptor: int, entry: TensorEntry, target: TensorTarget, weights: Mapping[str, Tensor]
) -> None:
    """Reads a tensor into its target."""
    read_into(descriptor, entry, weights[target.weight][target.region])


def quantise_tensor(
    descriptor: int,
    entry: TensorEntry,
    target: TensorTarget,
    weights: Mapping[str, Tensor],
    form: QuantFormat,
) -> None:
    """Quantises float weights into values and scales, a few megabytes of rows at a time."""
    numbers = weights[f"{target.weight}.q"][target.region]
    scales = weights[f"{target.weight}.scales"][target.region]
    for index, rows in read_rows(descriptor, entry):
        try:
            quantised = quantize(rows, form)
        except CoterieError as error:
            raise CheckpointError(f"{entry.name} {error}") from None
        numbers[index].copy_(quantised.q)
        scales[index].copy_(quantised.scales)


def map_tensor(descriptor: int, entry: TensorEntry, *, populate: bool = True) -> Tensor:
    """Maps the tensor's bytes and, with ``populate``, reads them into memory.

    The memory is the page cache of the file, shared by all processes that map it. The map is
    private, so writes do not reach the file. If the file is truncated while it is mapped, reading
    the missing part kills the process (SIGBUS).
    """
    end = entry.start + entry.size
    try:
        memory = mmap.mmap(
            descriptor, end, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    except ValueError:  # the file is shorter
        raise CheckpointError(TRUNCATED_FILE) from None
    if populate:
        # Uses huge pages if the page cache has them for this file system.
        with suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        populate_pages(memory, end)
    count = entry.size // entry.dtype.itemsize
    tensor = torch.frombuffer(memory, dtype=entry.dtype, offset=entry.start, count=count)
    return tensor.view(entry.shape)


def populate_pages(memory: mmap.mmap, end: int) -> None:
    """Reads missing pages from disk and maps all pages."""
    try:
        for start in range(0, end, POPULATE_CHUNK):
            memory.madvise(POPULATE_READ, start, min(POPULATE_CHUNK, end - start))
    except OSError as error:
        if error.errno in (errno.EFAULT, errno.EIO):
            raise CheckpointError(TRUNCATED_FILE) from None
        # Without that advice, touching each page does the same, slower.
        torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE].sum()
