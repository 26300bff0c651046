"""A model known again: a short hash of its files that reads little of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from coterie.model.checkpoint import Checkpoint

HASHED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
SAMPLE_BYTES = 64  # bytes read in the middle of each tensor
NUM_DIGITS = 16


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits of what decides a model's answers, wherever its folder lies.

    The small files count whole; of the weights, every tensor's name, type, shape and the bytes in
    its middle: training moves them all. No times, no names of files.
    """
    digest = hashlib.sha256()
    for name in HASHED_FILES:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    tensors = {
        entry.name: (file, entry)
        for file, entries in Checkpoint.of(folder).files.items()
        for entry in entries.values()
    }
    descriptors: dict[Path, int] = {}
    try:
        for name, (file, entry) in sorted(tensors.items()):
            if file not in descriptors:
                descriptors[file] = os.open(file, os.O_RDONLY)
            middle = entry.start + max(0, entry.size - SAMPLE_BYTES) // 2
            digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            digest.update(os.pread(descriptors[file], min(SAMPLE_BYTES, entry.size), middle))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()[:NUM_DIGITS]
