"""A CUDA device says what the CPU says; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import coterie
from coterie.checkpoints.conversion import ConversionTarget, convert
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.testing import FAMILY_CONFIGS, write_checkpoint

PROMPT = list(range(3, 20))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
@pytest.mark.parametrize("policy", ["vanilla", "des-vote:beta=0.3", "des-seq:k=2", "naee:beta=0.2"])
def test_cuda_equals_cpu(tmp_path: Path, family: str, policy: str) -> None:
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
            PROMPT, kv_cache=plan, max_new_tokens=24, block=8
        )
        for device in ("cpu", "cuda")
    )
    assert (there.tokens, there.forwards) == (here.tokens, here.forwards)


@needs_cuda
def test_seed_samples_equally_on_both_devices(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada2", seed=7)
    here, there = (
        coterie.load(folder, device=device, dtype="float32").generate(
            PROMPT, temperature=0.8, top_p=0.9, seed=11, max_new_tokens=24
        )
        for device in ("cpu", "cuda")
    )
    assert there.tokens == here.tokens


@needs_cuda
@pytest.mark.parametrize("kept", ["plain", "int8", "int4", "bf16"])
@pytest.mark.parametrize("host", [None, "30KB"])
def test_gpu_offload_equals_resident(tmp_path: Path, kept: str, host: str | None) -> None:
    """Behind few slots stands host memory for all, or for some before a packed checkpoint."""
    dtype = torch.float32 if kept == "plain" else torch.bfloat16
    folder = write_checkpoint(tmp_path / "whole", "llada2", seed=8, dtype=dtype)
    if kept != "plain":
        convert(folder, tmp_path / "packed", ConversionTarget.parse(kept))
        folder = tmp_path / "packed"
    elif host is not None:
        pytest.skip("whole checkpoints are not read expert by expert")
    asked = {"max_new_tokens": 24, "block": 8, "unmask": "fixed:steps=3"}
    whole = coterie.load(folder, device="cuda", dtype="float32")
    for memory in ("1", "5", "15"):
        told = ExpertMemoryConfig.parse(memory, host_memory=host)
        few = coterie.load(folder, device="cuda", dtype="float32", expert_memory=told)
        for policy in ("vanilla", "des-vote:beta=0.3"):
            found, true = (one.generate(PROMPT, policy=policy, **asked) for one in (few, whole))
            assert found.tokens == true.tokens
        traffic = few.traffic()
        assert traffic is not None
        assert traffic.experts_moved > 0
        assert traffic.stall_seconds >= 0


@needs_cuda
def test_cpu_experts_equal_resident(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada2", seed=9)
    asked = {"max_new_tokens": 24, "block": 8, "unmask": "fixed:steps=3"}
    whole = coterie.load(folder, device="cuda", dtype="float32").generate(PROMPT, **asked)
    for aside in ("2", "auto", "100"):
        memory = ExpertMemoryConfig.parse("35%", cpu_experts=aside)
        few = coterie.load(folder, device="cuda", dtype="float32", expert_memory=memory)
        assert few.generate(PROMPT, **asked).tokens == whole.tokens
        traffic = few.traffic()
        assert traffic is not None
        assert aside == "auto" or traffic.on_cpu > 0
