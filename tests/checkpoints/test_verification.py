"""``coterie inspect --verify``: which expert of a packed checkpoint is damaged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import packed_checkpoint

from coterie.checkpoints.manifest import MANIFEST
from coterie.checkpoints.verification import verify
from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.loading.load import load_model
from coterie.model.checkpoint import SINGLE_FILE, Checkpoint

LAYER = "packed-experts-of-layer-1.safetensors"
PACKED = "model.layers.1.mlp.experts.packed"


def test_verify_names_the_expert_with_a_flipped_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed_checkpoint(tmp_path)
    assert run(["inspect", str(folder), "--verify"]) == 0
    told = capsys.readouterr().out
    assert "among them 32 packed experts" in told
    assert "int8 in groups of 64, packed" in told
    entry = Checkpoint.of(folder).files[folder / LAYER][PACKED]
    for expert in (5, 11):
        flip(folder / LAYER, entry.start + expert * entry.shape[1] + 77)
    assert run(["inspect", str(folder), "--verify"]) == 2
    complaint = capsys.readouterr().err
    assert f"{LAYER}: {PACKED}: expert 5 is not what was written, nor are 1 more" in complaint
    assert complaint.count("\n") == 1
    flip(folder / LAYER, entry.start + 5 * entry.shape[1] + 77)
    flip(folder / LAYER, entry.start + 11 * entry.shape[1] + 77)
    assert verify(folder).experts == 32
    name, entry = list(Checkpoint.of(folder).files[folder / SINGLE_FILE].items())[2]
    flip(folder / SINGLE_FILE, entry.start)
    with pytest.raises(CoterieError, match=f"{re.escape(name)} is not what was written; copy"):
        verify(folder)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def test_damaged_folder_raises(tmp_path: Path) -> None:
    folder = packed_checkpoint(tmp_path)
    content = (folder / LAYER).read_bytes()
    for damaged, problem in (
        (content[:-1], "truncated"),
        (content + b"\0", "1 bytes follow the last tensor"),
        (content[:2000], "truncated: its header needs 4096 of 2000 bytes"),
    ):
        (folder / LAYER).write_bytes(damaged)
        for read in (load_model, verify):
            with pytest.raises(CoterieError, match=f"{LAYER}: .*{problem}"):
                read(folder)
    (folder / LAYER).unlink()
    with pytest.raises(CoterieError, match=f"names {LAYER} for .*: no such file"):
        load_model(folder)
    (folder / LAYER).write_bytes(content)
    save_file({PACKED: torch.zeros(16, 128, dtype=torch.uint8)}, folder / LAYER)
    with pytest.raises(CoterieError, match=r"packed has shape \[16, 128\], config.json makes it"):
        load_model(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(CoterieError, match=r"manifest\.json: no such file"):
        verify(folder)
