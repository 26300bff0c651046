"""The manifest of a converted checkpoint, which lists a checksum for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coterie.errors import CheckpointError
from coterie.strict_json import LISTING_FILE, read_object

MANIFEST = "manifest.json"

Checksums = dict[str, dict[str, object]]
"""Tensor name -> its sha256, or a crc32 for each expert in it."""


def manifest_checksums(folder: Path) -> dict[str, Mapping[str, object]]:
    """The manifest's entry of each tensor; raises CheckpointError if there is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; `coterie quantize` writes it")
    entries = read_object(path, LISTING_FILE).get("tensors")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise CheckpointError(f"{path}: it has no checksums of tensors")
    return entries
