"""From one tensor of a file to its place in memory: read, quantised, unpacked, or mapped."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import CoterieError
from coterie.model.safetensors_file import TensorEntry, read_into, read_rows
from coterie.model.spec import ModelSpec
from coterie.model.weights import PACKED_NAME, TensorTarget, is_always_fp32, is_packed
from coterie.ops.packed_layout import unpack_expert
from coterie.quantization import QTensor, QuantFormat, quantize

POPULATE_READ = 22  # madvise's, which Python does not name everywhere
TRUNCATED_FILE = "cannot be read to its end: it became shorter meanwhile, or the disk failed"
POPULATE_CHUNK = 64 << 20  # bytes of a mapped file made present in one call


@dataclass(frozen=True)
class WeightLoader:
    """Puts each tensor of a checkpoint of ``stored`` where a model of ``kept`` has it."""

    stored_spec: ModelSpec
    loaded_spec: ModelSpec
    weights: dict[str, Tensor]  # grows by what is mapped
    skip_packed: bool = False  # packed experts stay in their file, and nothing is read of them

    def __call__(self, descriptor: int, entry: TensorEntry, target: TensorTarget) -> None:
        """Raises CoterieError, naming the tensor where that helps."""
        if is_packed(target.weight) and self.skip_packed:
            return
        if is_packed(target.weight) and self.loaded_spec.panels:
            self.weights[target.weight] = map_tensor(descriptor, entry)
        elif is_packed(target.weight):
            self._unpack(descriptor, entry, target)
        elif target.weight in self.weights:
            read_tensor(descriptor, entry, target, self.weights)
        elif self.loaded_spec.expert_format is not None:
            quantise_tensor(descriptor, entry, target, self.weights, self.loaded_spec.expert_format)

    def _unpack(self, descriptor: int, entry: TensorEntry, target: TensorTarget) -> None:
        """One expert at a time, on the device that it is for."""
        experts = target.weight.removesuffix(PACKED_NAME)
        kind, spec = self.stored_spec.panel_kind, self.stored_spec
        size = spec.expert_stride
        blob = torch.empty(size, dtype=torch.uint8)
        for expert in range(entry.shape[0]):
            start = entry.start + expert * size
            read_into(descriptor, TensorEntry(entry.name, entry.dtype, (size,), start), blob)
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
    """What decides must be finite: a NaN there would elect experts and leave no trace in logits."""
    view = weights[target.weight][target.region]
    read_into(descriptor, entry, view)
    must_be_finite = is_always_fp32(target.weight) or target.weight.endswith(".scales")
    if must_be_finite and not bool(torch.isfinite(view).all()):
        raise CoterieError(f"{entry.name} holds NaN or infinity")


def quantise_tensor(
    descriptor: int,
    entry: TensorEntry,
    target: TensorTarget,
    weights: Mapping[str, Tensor],
    form: QuantFormat,
) -> None:
    """Float weights into numbers and scales, a few megabytes of rows at a time."""
    numbers = weights[f"{target.weight}.q"][target.region]
    scales = weights[f"{target.weight}.scales"][target.region]
    for index, rows in read_rows(descriptor, entry):
        try:
            quantised = quantize(rows, form)
        except CoterieError as error:
            raise CoterieError(f"{entry.name} {error}") from None
        numbers[index].copy_(quantised.q)
        scales[index].copy_(quantised.scales)


def map_tensor(descriptor: int, entry: TensorEntry) -> Tensor:
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
        raise CoterieError(TRUNCATED_FILE) from None
    # Where the system's cache keeps files in large pieces this finds huge pages; elsewhere nothing.
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    populate_pages(memory, end)
    tensor_bytes = torch.frombuffer(memory, dtype=torch.uint8, offset=entry.start, count=entry.size)
    return tensor_bytes.view(entry.shape)


def populate_pages(memory: mmap.mmap, end: int) -> None:
    """Read in what is not in the system's cache, and enter all of it into the page table."""
    try:
        for start in range(0, end, POPULATE_CHUNK):
            memory.madvise(POPULATE_READ, start, min(POPULATE_CHUNK, end - start))
    except OSError as error:
        if error.errno in (errno.EFAULT, errno.EIO):
            raise CoterieError(TRUNCATED_FILE) from None
        # A system without that advice: touching each page does the same, less quickly.
        torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE].sum()
