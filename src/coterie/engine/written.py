"""The files of a converted checkpoint: what each holds, and how that comes out of the source."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedWriter
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.distance import ERROR, distance
from coterie.engine.journal import Sums
from coterie.families.names import is_expert, quantised
from coterie.model.filling import quantise_tensor, read_tensor
from coterie.model.shard import DTYPES, Entry, bytes_of, rows_of
from coterie.model.spec import ModelSpec
from coterie.model.weights import Place, packed_shape, parts
from coterie.naming import CoterieError
from coterie.quant import Format, QTensor, quantise
from coterie.values import Panels, Slab

NAMES = {dtype: name for name, dtype in DTYPES.items()}
PAGE = 4096  # bytes that packed experts begin at a multiple of in their file

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""

Heard = Callable[[int], None]
"""Told the bytes of the source that were read."""


@dataclass(frozen=True)
class Sources:
    """The source's files, each opened once."""

    opened: dict[Path, int] = field(default_factory=dict)

    def descriptor(self, file: Path) -> int:
        if file not in self.opened:
            self.opened[file] = os.open(file, os.O_RDONLY)
        return self.opened[file]

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.opened.values():
            os.close(descriptor)


class OutFile(Protocol):
    """One file to be written, after its header."""

    @property
    def name(self) -> str: ...

    @property
    def header(self) -> bytes: ...

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        ...

    @property
    def reads(self) -> int:
        """Bytes of the source."""
        ...

    def write(self, sink: BufferedWriter, sources: Sources, heard: Heard) -> Sums:
        """Everything past the header; returns its checksums."""
        ...


@dataclass(frozen=True)
class Shard:
    """One file of the source, its tensors as they are or each as numbers and their scales."""

    source: Path
    entries: Mapping[str, Entry]
    held: Mapping[str, Mapping[str, Kind]]  # of each entry what becomes of it: one part, or two
    form: Format | None

    @staticmethod
    def of(
        source: Path, entries: Mapping[str, Entry], places: Mapping[str, Place], form: Format | None
    ) -> Shard:
        """``form``: of the experts; None: they stay as they are."""

        def held(entry: Entry) -> dict[str, Kind]:
            place = places[entry.name]
            if form is None or not is_expert(place):
                return {entry.name: (entry.shape, entry.dtype)}
            stored = quantised(form, entry.name, place)
            return {name: (at.shape, at.dtype or entry.dtype) for name, at in stored}

        return Shard(source, entries, {name: held(e) for name, e in entries.items()}, form)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def header(self) -> bytes:
        return header({name: kind for held in self.held.values() for name, kind in held.items()})

    @property
    def bytes(self) -> int:
        kinds = (kind for held in self.held.values() for kind in held.values())
        return len(self.header) + sum(prod(shape) * dtype.itemsize for shape, dtype in kinds)

    @property
    def reads(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def write(self, sink: BufferedWriter, sources: Sources, heard: Heard) -> Sums:
        sums: Sums = {}
        for entry in self.entries.values():
            digests = {name: hashlib.sha256() for name in self.held[entry.name]}
            for name, piece in _of_file(self.source, entry, self._pieces(sources, entry)):
                content = as_bytes(piece)
                digests[name].update(content)
                sink.write(content)
            sums |= {name: {"sha256": found.hexdigest()} for name, found in digests.items()}
            heard(entry.size)
        return sums

    def _pieces(self, sources: Sources, entry: Entry) -> Iterator[tuple[str, Tensor]]:
        """A tensor's bytes, or all its numbers and then all its scales."""
        names, source = tuple(self.held[entry.name]), sources.descriptor(self.source)
        if self.form is None or len(names) == 1:
            yield from ((names[0], piece) for piece in bytes_of(source, entry))
            return
        numbers, scales = names
        waiting = []
        for _, rows in rows_of(source, entry):
            found = quantise(rows, self.form)
            waiting.append(found.scales)
            yield numbers, found.q
        yield from ((scales, piece) for piece in waiting)


@dataclass(frozen=True)
class PackedLayer:
    """All experts of a layer in one tensor, a row an expert, beginning at a page of the file."""

    tensor: str
    layer: int
    kept: ModelSpec  # as the experts come out
    sources: Sequence[tuple[Path, Entry, Place]]  # whatever of the source goes into them

    @property
    def name(self) -> str:
        return f"packed-experts-of-layer-{self.layer}.safetensors"

    @property
    def header(self) -> bytes:
        return header({self.tensor: (packed_shape(self.kept), torch.uint8)}, PAGE)

    @property
    def bytes(self) -> int:
        return len(self.header) + prod(packed_shape(self.kept))

    @property
    def reads(self) -> int:
        return sum(entry.size for _, entry, _ in self.sources)

    def write(self, sink: BufferedWriter, sources: Sources, heard: Heard) -> Sums:
        """Sums the bytes of each expert alone: so one that is read alone can be checked. Of those
        that lose something here, it also tells how much."""
        found, errors, form = [], [], self.kept.expert_format
        loses = form is not None and all(is_whole(place) for _, _, place in self.sources)
        for expert in range(self.kept.router.experts):
            slab = self._read(expert, sources, form)
            packed = ops.pack(slab).gate_up
            assert isinstance(packed, Panels)
            content = as_bytes(packed.packed)
            found.append(f"{zlib.crc32(content):08x}")
            sink.write(content)
            if loses:
                errors.append(float(f"{distance(self._read(expert, sources, None), slab):.4g}"))
            heard(self.reads // self.kept.router.experts)
        return {self.tensor: {"crc32": found, **({ERROR: errors} if loses else {})}}

    def _read(self, expert: int, sources: Sources, form: Format | None) -> Slab:
        """A slab of one, in memory of its own."""
        hidden, width = self.kept.hidden, self.kept.expert_width
        shapes = {"gate_up": (2 * width, hidden), "down": (hidden, width)}
        weights = dict(_allocated(shapes, form))
        for file, entry, place in self.sources:
            if (part := _of_expert(entry, place, expert)) is None:
                continue
            try:
                if part[1].target in weights:
                    read_tensor(sources.descriptor(file), *part, weights)
                elif form is not None:
                    quantise_tensor(sources.descriptor(file), *part, weights, form)
            except OSError as error:
                raise CoterieError(f"{file}: cannot be read ({error.strerror})") from None
            except CoterieError as error:
                raise CoterieError(f"{file}: {error}") from None
        nobody = torch.zeros(1, dtype=torch.int64)
        if form is None:
            return Slab(weights["gate_up"][None], weights["down"][None], nobody)
        gate_up, down = (
            QTensor(weights[f"{name}.q"][None], weights[f"{name}.scales"][None], form, k)
            for name, (_, k) in shapes.items()
        )
        return Slab(gate_up, down, nobody)


def header(kinds: Mapping[str, Kind], to: int = 8) -> bytes:
    """As safetensors begins: a length, then JSON, filled up to a multiple of ``to`` bytes."""
    listed: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in kinds.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        listed[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % to)
    return len(text).to_bytes(8, "little") + text


def _of_file(
    file: Path, entry: Entry, pieces: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """What goes wrong while reading names what is read, lest it pass for an error of writing."""
    try:
        yield from pieces
    except OSError as error:
        raise CoterieError(f"{file}: cannot be read ({error.strerror})") from None
    except CoterieError as error:
        raise CoterieError(f"{file}: {entry.name} {error}") from None


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _allocated(
    shapes: Mapping[str, tuple[int, int]], form: Format | None
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        if form is None:
            yield name, torch.empty(shape, dtype=torch.bfloat16)
        else:
            for part, (held, dtype) in parts(form, shape).items():
                yield f"{name}.{part}", torch.empty(held, dtype=dtype)


def is_whole(place: Place) -> bool:
    """Whether this is a weight itself, and not the numbers or the scales of one in few bits."""
    return not place.target.endswith((".q", ".scales"))


def _of_expert(entry: Entry, place: Place, expert: int) -> tuple[Entry, Place] | None:
    """What of a tensor is this expert's, and where in it that goes; None where nothing is."""
    target = place.target.partition(".experts.")[2]
    at = place.region[0] if place.region else slice(None)
    if isinstance(at, int):
        found = Place(target, place.shape, place.region[1:], place.dtype)
        return (entry, found) if at == expert else None
    shape = entry.shape[1:]
    start = entry.start + expert * prod(shape) * entry.dtype.itemsize
    inner = Entry(entry.name, entry.dtype, shape, start)
    return inner, Place(target, shape, place.region[1:], place.dtype)
