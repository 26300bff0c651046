"""The files of a converted checkpoint, and how each is made from the source."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedWriter
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from coterie import ops
from coterie.checkpoints.manifest import Checksums
from coterie.checkpoints.quantization_error import ERROR_KEY, quantization_error
from coterie.families.names import quantised_targets
from coterie.files import OpenFiles, read_errors
from coterie.model.safetensors_file import DTYPE_NAMES, TensorEntry, read_chunks, read_rows
from coterie.model.spec import ModelSpec
from coterie.model.weight_loader import quantise_tensor, read_tensor
from coterie.model.weights import HEAD, TensorTarget, packed_shape
from coterie.quantization import QuantFormat, dequantize, quantize
from coterie.values import PackedExperts, Slab

TensorLayout = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""

ByteCallback = Callable[[int], None]
"""Gets the number of source bytes that were read."""


@dataclass(frozen=True)
class ConvertedShard:
    """A source file with some of its tensors quantized, and the others copied unchanged.

    ``outputs`` maps each source tensor to the tensors made from it: itself, or values and scales,
    or for a head all three.
    """

    source: Path
    entries: Mapping[str, TensorEntry]
    outputs: Mapping[str, Mapping[str, TensorLayout]]
    formats: Mapping[str, QuantFormat]  # of the tensors to quantize
    alignment: int = 8  # the data starts at a multiple of so many bytes

    @staticmethod
    def for_source(
        source: Path,
        entries: Mapping[str, TensorEntry],
        targets: Mapping[str, TensorTarget],
        formats: Mapping[str, QuantFormat],
    ) -> ConvertedShard:
        """``formats`` are those of the tensors to quantize."""

        def outputs(entry: TensorEntry) -> dict[str, TensorLayout]:
            name, target = entry.name, targets[entry.name]
            own = {name: (entry.shape, entry.dtype)}
            if name not in formats:
                return own
            parts_by_name = quantised_targets(formats[name], name, target)
            parts = {each: (part.shape, part.dtype or entry.dtype) for each, part in parts_by_name}
            return own | parts if target.weight == HEAD else parts

        return ConvertedShard(
            source, entries, {name: outputs(e) for name, e in entries.items()}, formats
        )

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def layouts(self) -> Mapping[str, TensorLayout]:
        """The tensors, in the order in which they are written."""
        return {name: layout for out in self.outputs.values() for name, layout in out.items()}

    @property
    def source_bytes(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def write(self, sink: BufferedWriter, sources: OpenFiles, on_bytes: ByteCallback) -> Checksums:
        """Write everything after the header; returns the checksums.

        Dense matrices that are quantized here also get their error, for unit Gaussian tokens.
        """
        checksums: Checksums = {}
        for entry in self.entries.values():
            digests = {name: hashlib.sha256() for name in self.outputs[entry.name]}
            squares = torch.zeros(2, dtype=torch.float64)
            for name, piece in self._pieces(sources, entry, squares):
                content = as_bytes(piece)
                digests[name].update(content)
                sink.write(content)
            checksums |= {name: {"sha256": digest.hexdigest()} for name, digest in digests.items()}
            if entry.name in self.formats and ".experts." not in entry.name and squares[1]:
                error = float((squares[0] / squares[1]).sqrt())
                checksums[f"{entry.name}.q"][ERROR_KEY] = float(f"{error:.4g}")
            on_bytes(entry.size)
        return checksums

    def _pieces(
        self, sources: OpenFiles, entry: TensorEntry, squares: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """A tensor's chunks under its name; quantized, all of its values, then its scales.

        Adds the squared norms of what quantizing changes, and of the weight, to ``squares``.
        """
        names = tuple(self.outputs[entry.name])
        # Errors inside are those of reading: those of writing are raised in the consumer.
        with read_errors(self.source):
            descriptor = sources.descriptor(self.source)
            if entry.name in names:
                yield from ((entry.name, piece) for piece in read_chunks(descriptor, entry))
            if (form := self.formats.get(entry.name)) is None:
                return
            values, scales = names[-2:]
            scale_pieces = []
            for _, rows in read_rows(descriptor, entry):
                quantized = quantize(rows, form)
                change = rows.float() - dequantize(quantized)
                squares += torch.stack([part.square().sum() for part in (change, rows.float())])
                scale_pieces.append(quantized.scales)
                yield values, quantized.q
        yield from ((scales, piece) for piece in scale_pieces)


@dataclass(frozen=True)
class PackedLayer:
    """All packed experts of a layer in one tensor: one row per expert, aligned to a page."""

    tensor: str
    layer: int
    converted_spec: ModelSpec
    sources: Sequence[tuple[Path, TensorEntry, TensorTarget]]
    alignment: int = 4096  # a page: experts are read past the system's cache

    @property
    def name(self) -> str:
        return f"packed-experts-of-layer-{self.layer}.safetensors"

    @property
    def layouts(self) -> Mapping[str, TensorLayout]:
        return {self.tensor: (packed_shape(self.converted_spec), torch.uint8)}

    @property
    def source_bytes(self) -> int:
        return sum(entry.size for _, entry, _ in self.sources)

    def write(self, sink: BufferedWriter, sources: OpenFiles, on_bytes: ByteCallback) -> Checksums:
        """Checksums each expert separately, since experts are also read separately.

        Experts that are quantized here also get their quantization error.
        """
        checksums, errors, expert_format = [], [], self.converted_spec.expert_format
        is_lossy = expert_format is not None and all(
            is_unquantized(target) for _, _, target in self.sources
        )
        for expert in range(self.converted_spec.router.experts):
            slab = self._expert_slab(expert, sources, expert_format)
            packed = ops.pack(slab).gate_up
            assert isinstance(packed, PackedExperts)
            content = as_bytes(packed.packed)
            checksums.append(f"{zlib.crc32(content):08x}")
            sink.write(content)
            if is_lossy:
                original = self._expert_slab(expert, sources, None)
                error = quantization_error(original, slab, self.converted_spec.activation)
                errors.append(float(f"{error:.4g}"))
            on_bytes(self.source_bytes // self.converted_spec.router.experts)
        return {self.tensor: {"crc32": checksums, **({ERROR_KEY: errors} if is_lossy else {})}}

    def _expert_slab(
        self, expert: int, sources: OpenFiles, expert_format: QuantFormat | None
    ) -> Slab:
        """A slab with one expert."""
        hidden, width = self.converted_spec.hidden, self.converted_spec.expert_width
        shapes = {"gate_up": (2 * width, hidden), "down": (hidden, width)}
        weights = dict(_allocate_weights(shapes, expert_format))
        for file, entry, target in self.sources:
            if (part := _expert_part(entry, target, expert)) is None:
                continue
            with read_errors(file):
                if part[1].weight in weights:
                    read_tensor(sources.descriptor(file), *part, weights)
                elif expert_format is not None:
                    quantise_tensor(sources.descriptor(file), *part, weights, expert_format)
        batch = {name: weight[None] for name, weight in weights.items()}
        return Slab.of(batch, expert_format, torch.zeros(1, dtype=torch.int64))


OutputFile = ConvertedShard | PackedLayer


def header(file: OutputFile) -> bytes:
    """The header of a safetensors file, padded to the file's alignment."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in file.layouts.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        offsets = {"data_offsets": [start, end]}
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), **offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % file.alignment)
    return len(text).to_bytes(8, "little") + text


def total_bytes(file: OutputFile) -> int:
    sizes = (prod(shape) * dtype.itemsize for shape, dtype in file.layouts.values())
    return len(header(file)) + sum(sizes)


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _allocate_weights(
    shapes: Mapping[str, tuple[int, int]], expert_format: QuantFormat | None
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        if expert_format is None:
            yield name, torch.empty(shape, dtype=torch.bfloat16)
        else:
            for part, (part_shape, dtype) in expert_format.parts(shape).items():
                yield f"{name}.{part}", torch.empty(part_shape, dtype=dtype)


def is_unquantized(target: TensorTarget) -> bool:
    """Whether the tensor is a weight, and not the values or the scales of a quantized one."""
    return not target.weight.endswith((".q", ".scales"))


def _expert_part(
    entry: TensorEntry, target: TensorTarget, expert: int
) -> tuple[TensorEntry, TensorTarget] | None:
    """The part of a tensor that belongs to an expert, and its target; None if there is none."""
    name, region = target.weight.partition(".experts.")[2], target.region
    part = replace(target, weight=name, region=region[1:])
    if region and isinstance(region[0], int):
        return (entry, part) if region[0] == expert else None
    shape = entry.shape[1:]
    return entry.part(shape, expert), replace(part, shape=shape)
