"""Verification of a converted checkpoint: its bytes against the checksums in its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from coterie.checkpoints.manifest import MANIFEST, manifest_checksums
from coterie.errors import CheckpointError
from coterie.files import ProgressCallback, opened, running_total
from coterie.keys import Key
from coterie.model.checkpoint import Checkpoint
from coterie.model.safetensors_file import TensorEntry, read_chunks
from coterie.offload.capacity import format_bytes
from coterie.ops import cpu


@dataclass(frozen=True)
class VerifyResult:
    """What was compared. All of it matched."""

    tensors: Annotated[int, Key("tensors")]
    experts: Annotated[int, Key("experts")]  # packed experts, which have a checksum each
    bytes: Annotated[int, Key("bytes")]

    def describe(self) -> str:
        experts = f", among them {self.experts} packed experts" if self.experts else ""
        size = format_bytes(self.bytes)
        return f"verified: {self.tensors} tensors{experts} ({size}) are what was written"


def verify(folder: Path, on_progress: ProgressCallback | None = None) -> VerifyResult:
    """Compare every byte of the weights with the manifest.

    ``on_progress`` gets (bytes read, total bytes). Raises CheckpointError that names the first
    difference, or if the folder has no manifest (published checkpoints have none).
    """
    checksums = manifest_checksums(folder)
    checkpoint = Checkpoint.of(folder)
    if mismatched := sorted(checkpoint.tensors ^ set(checksums)):
        raise CheckpointError(
            f"{folder / MANIFEST}: {mismatched[0]} is missing in it or in the files"
        )
    experts, differences = 0, list[str]()
    on_bytes = running_total(checkpoint.bytes, on_progress)
    for file, entries in checkpoint.files.items():
        with opened(file) as descriptor:
            for entry in entries.values():
                differences += [
                    f"{file}: {difference}"
                    for difference in _differences(descriptor, entry, checksums)
                ]
                experts += entry.shape[0] if "crc32" in checksums[entry.name] else 0
                on_bytes(entry.size)
    if differences:
        more = f", nor are {len(differences) - 1} more" if len(differences) > 1 else ""
        raise CheckpointError(
            f"{differences[0]} is not what was written{more}; copy or convert the files again"
        )
    return VerifyResult(len(checksums), experts, checkpoint.bytes)


def _differences(
    descriptor: int, entry: TensorEntry, checksums: Mapping[str, Mapping[str, object]]
) -> Iterator[str]:
    """The tensor, or the experts in it, with another checksum than the manifest's."""
    expected = checksums[entry.name].get("crc32")
    if not isinstance(expected, list):
        digest = hashlib.sha256()
        for piece in read_chunks(descriptor, entry):
            digest.update(piece.numpy().data)
        if digest.hexdigest() != checksums[entry.name].get("sha256"):
            yield entry.name
        return
    count, size = entry.shape
    if len(expected) != count:
        yield f"{entry.name}: its number of experts"
    for expert, checksum in enumerate(expected[:count]):
        if f"{expert_checksum(descriptor, entry.part((size,), expert)):08x}" != checksum:
            yield f"{entry.name}: expert {expert}"


def expert_checksum(descriptor: int, row: TensorEntry) -> int:
    """The checksum of one packed expert."""
    checksum = 0
    for piece in read_chunks(descriptor, row):
        checksum = cpu.crc32(piece, checksum)
    return checksum
