"""A short hash that identifies a model without reading all of its weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from coterie.files import MIB, OpenFiles, read_errors, read_file
from coterie.model.checkpoint import Checkpoint
from coterie.model.safetensors_file import TensorEntry

HASHED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
SAMPLE_BYTES, FILE_LIMIT = 64, 256 * MIB
NUM_DIGITS = 16


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits that depend on what decides a model's answers, and not on file names.

    Hashes the small files whole. Of each tensor it hashes the name, the dtype, the shape and the
    bytes in the middle, since training changes all tensors.
    """
    digest = hashlib.sha256()
    for name in HASHED_FILES:
        path = folder / name
        content = read_file(path, FILE_LIMIT) if path.is_file() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    tensors = {
        entry.name: (file, entry)
        for file, entries in Checkpoint.of(folder).files.items()
        for entry in entries.values()
    }
    with OpenFiles() as files:
        for name, (file, entry) in sorted(tensors.items()):
            digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            with read_errors(file):
                digest.update(sample_bytes(files.descriptor(file), entry))
    return digest.hexdigest()[:NUM_DIGITS]


def sample_bytes(descriptor: int, entry: TensorEntry) -> bytes:
    """At most ``SAMPLE_BYTES`` from the middle of a tensor."""
    middle = entry.start + max(0, entry.size - SAMPLE_BYTES) // 2
    return os.pread(descriptor, min(SAMPLE_BYTES, entry.size), middle)
