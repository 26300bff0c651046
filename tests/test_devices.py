"""A CUDA device says what the CPU says; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import coterie
from coterie.testing import CONFIGS, write_checkpoint

PROMPT = list(range(3, 20))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("policy", ["vanilla", "des-vote:beta=0.3", "des-seq:k=2", "naee:beta=0.2"])
def test_cuda_writes_what_the_cpu_writes(tmp_path: Path, family: str, policy: str) -> None:
    folder = write_checkpoint(tmp_path, family, seed=5)
    here, there = (
        coterie.load(folder, device=device, dtype="float32").generate(
            PROMPT, policy=policy, max_new_tokens=24
        )
        for device in ("cpu", "cuda")
    )
    assert there.device.startswith("cuda")
    assert there.tokens == here.tokens
    assert (there.forwards, there.experts) == (here.forwards, here.experts)
    assert there.vote_mass_kept == pytest.approx(here.vote_mass_kept, abs=1e-5)


@needs_cuda
@pytest.mark.parametrize("plan", ["uncached", "prefix", "dual:before=4,after=4"])
def test_every_plan_of_a_bidirectional_model_agrees(tmp_path: Path, plan: str) -> None:
    folder = write_checkpoint(tmp_path, "llada-moe", seed=6)
    here, there = (
        coterie.load(folder, device=device, dtype="float32").generate(
            PROMPT, plan=plan, max_new_tokens=24, block=8
        )
        for device in ("cpu", "cuda")
    )
    assert (there.tokens, there.forwards) == (here.tokens, here.forwards)


@needs_cuda
def test_a_seed_draws_the_same_on_both(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada2", seed=7)
    here, there = (
        coterie.load(folder, device=device, dtype="float32").generate(
            PROMPT, temperature=0.8, top_p=0.9, seed=11, max_new_tokens=24
        )
        for device in ("cpu", "cuda")
    )
    assert there.tokens == here.tokens
