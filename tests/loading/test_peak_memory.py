"""Loading needs at most 1.15 times the memory of the weights that are kept, whatever the shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coterie.checkpoints.model_info import inspect
from coterie.testing import write_checkpoint

STATUS = Path("/proc/self/status")
SIZES = {
    "vocab_size": 30_000,
    "hidden_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_experts": 16,
    "moe_intermediate_size": 512,
    "intermediate_size": 1024,
}
LOAD = """
import re, sys
from pathlib import Path
from coterie.loading.load import load_model

def memory(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

dense = sys.argv[4] if len(sys.argv) > 4 else None
load_model(sys.argv[3], dtype=sys.argv[2], device="cpu", dense_dtype=dense)  # libraries' own pages
before = memory("VmRSS")
model = load_model(sys.argv[1], dtype=sys.argv[2], device="cpu", dense_dtype=dense)
print(memory("VmHWM") - before, memory("VmRSS") - before)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell a process's memory")
@pytest.mark.parametrize(
    ("shards", "stacked", "stored", "kept"),
    [
        pytest.param(1, False, "bf16", "bf16", marks=pytest.mark.slow),
        (1, True, "bf16", "fp32"),
        pytest.param(7, True, "bf16", "bf16", marks=pytest.mark.slow),
        pytest.param(40, False, "fp32", "bf16", marks=pytest.mark.slow),
    ],
)
def test_loading_peaks_little_above_the_weights(
    tmp_path: Path, shards: int, stacked: bool, stored: str, kept: str
) -> None:
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    folder, small = tmp_path / "model", tmp_path / "small"
    write_checkpoint(small, "llada2", stacked=stacked, dtype=dtypes[stored])
    write_checkpoint(
        folder, "llada2", shards=shards, stacked=stacked, dtype=dtypes[stored], **SIZES
    )
    weights = inspect(folder, dtype=dtypes[kept]).size.bytes
    assert weights > 80 << 20
    peak, after = loaded_memory(folder, kept, small)
    assert weights * 0.98 <= after <= peak <= weights * 1.15, json.dumps([weights, peak, after])


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell a process's memory")
def test_dense_matrices_in_8_bits_take_less_memory(tmp_path: Path) -> None:
    sizes = SIZES | {"vocab_size": 100_000}
    folder = write_checkpoint(tmp_path / "model", "llada2", dtype=torch.bfloat16, **sizes)
    small = write_checkpoint(tmp_path / "small", "llada2", dtype=torch.bfloat16)
    peak, after = loaded_memory(folder, "bf16", small)
    less_peak, less_after = loaded_memory(folder, "bf16", small, "int8")
    # The head of 98 MiB stays in its file, and a copy of half of that is in memory.
    assert peak - less_peak > 25 << 20 < after - less_after, json.dumps(
        [peak, less_peak, after, less_after]
    )


def loaded_memory(folder: Path, *arguments: object) -> tuple[int, int]:
    """The peak of memory while a model loads, and what it takes after that."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, after = map(int, done.stdout.split())
    return peak, after
