"""Memory of `coterie quantize`, and of loading with conversion, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coterie.checkpoints.model_info import inspect
from coterie.testing import write_checkpoint

MEMORY = """
import re, sys
from pathlib import Path
from coterie.checkpoints.conversion import ConversionTarget, convert
from coterie.loading.load import load_model
from coterie.quantization import QuantFormat, quantize
import torch

def memory(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

quantize(torch.ones(1, 64), QuantFormat(8, 64))
before = memory("VmRSS")
convert(sys.argv[1], Path(sys.argv[2]), ConversionTarget(QuantFormat(8, 64), packed=False))
print(memory("VmHWM") - before)
load_model(sys.argv[1], dtype="bf16", device="cpu", expert_dtype="int8")
print(memory("VmHWM") - before)
"""
LARGE = {
    "vocab_size": 30_000,
    "hidden_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_experts": 16,
    "moe_intermediate_size": 512,
}


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_memory_stays_bounded_while_quantising(tmp_path: Path, stacked: bool) -> None:
    source = write_checkpoint(
        tmp_path / "whole", "llada2", stacked=stacked, dtype=torch.bfloat16, **LARGE
    )
    out = tmp_path / "small"
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, source, out],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    converting, loading = map(int, done.stdout.split())
    weights = inspect(out).size.bytes
    assert weights > 80 << 20
    assert converting < 48 << 20
    assert loading < 1.15 * weights + (24 << 20)
