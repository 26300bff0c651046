"""Whether a converted checkpoint still is what was written: its bytes against its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from coterie.engine.journal import MANIFEST
from coterie.keys import Key
from coterie.model.checkpoint import Checkpoint
from coterie.model.shard import Entry, bytes_of
from coterie.model.strictjson import read_object
from coterie.naming import CoterieError
from coterie.ops import cpu


@dataclass(frozen=True)
class Verified:
    """What was compared, all of it as it was written."""

    tensors: Annotated[int, Key("tensors")]
    experts: Annotated[int, Key("experts")]  # packed ones, each with a checksum of its own
    bytes: Annotated[int, Key("bytes")]


def verify(folder: Path, told: Callable[[int, int], None] | None = None) -> Verified:
    """Read every byte of the weights and compare; ``told`` hears (bytes read, bytes in all).

    Raises CoterieError that names what differs, the first where there is more; also for a folder
    without a manifest, as published ones are.
    """
    sums = sums_of(folder)
    checkpoint = Checkpoint.of(folder)
    if strangers := sorted(checkpoint.tensors ^ set(sums)):
        raise CoterieError(f"{folder / MANIFEST}: {strangers[0]} is in it or in a file, not both")
    done, experts, wrong = 0, 0, []
    for file, entries in checkpoint.files.items():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            for entry in entries.values():
                wrong += [f"{file}: {what}" for what in _differences(descriptor, entry, sums)]
                experts += entry.shape[0] if "crc32" in sums[entry.name] else 0
                done += entry.size
                if told is not None:
                    told(done, checkpoint.bytes)
        finally:
            os.close(descriptor)
    if wrong:
        more = f", nor are {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CoterieError(
            f"{wrong[0]} is not what was written{more}; copy the files again, or convert again"
        )
    return Verified(len(sums), experts, done)


def _differences(
    descriptor: int, entry: Entry, sums: Mapping[str, Mapping[str, object]]
) -> Iterator[str]:
    """The tensor, or the experts in it, whose bytes do not have their checksum."""
    expected = sums[entry.name].get("crc32")
    if not isinstance(expected, list):
        digest = hashlib.sha256()
        for piece in bytes_of(descriptor, entry):
            digest.update(piece.numpy().data)
        if digest.hexdigest() != sums[entry.name].get("sha256"):
            yield entry.name
        return
    count, size = entry.shape
    if len(expected) != count:
        yield f"{entry.name}: its number of experts"
    for expert, sum_ in enumerate(expected[:count]):
        row = Entry(entry.name, entry.dtype, (size,), entry.start + expert * size)
        if f"{expert_sum(descriptor, row):08x}" != sum_:
            yield f"{entry.name}: expert {expert}"


def expert_sum(descriptor: int, row: Entry) -> int:
    """The checksum of one packed expert."""
    found = 0
    for piece in bytes_of(descriptor, row):
        found = cpu.crc32(piece, found)
    return found


def sums_of(folder: Path) -> dict[str, Mapping[str, object]]:
    """Of every tensor, as the manifest has them; raises CoterieError where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CoterieError(f"{path}: no such file; `coterie quantize` writes it with its models")
    listed = read_object(path).get("tensors")
    if not isinstance(listed, dict) or not all(isinstance(sum_, dict) for sum_ in listed.values()):
        raise CoterieError(f"{path}: has no checksums of tensors")
    return listed
