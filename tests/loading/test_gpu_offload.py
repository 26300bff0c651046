"""Experts behind a GPU's slots: loaded into host memory, copied when needed, the same answers.

The GPU is imagined: a CPU whose copies go through a queue, done as soon as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from asynchronous_device import World
from torch import Tensor

import coterie
from coterie import ops
from coterie.checkpoints.conversion import ConversionTarget, convert
from coterie.cli.memory_options import describe_memory_plan
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.loading import gpu_offload
from coterie.loading.expert_memory import ExpertMemoryConfig, non_expert_bytes
from coterie.offload import pinned_memory
from coterie.offload.gpu_fetchers import PinnedCopyFetcher, StagedFetcher
from coterie.testing import write_checkpoint

pytestmark = pytest.mark.usefixtures("far")
PROMPT = [5, 17, 33, 2, 9]
ASKED = {"max_new_tokens": 24, "block": 8, "unmask": "fixed:steps=3"}
EXPERTS = 16


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device has memory of its own, and computes with experts as they lie."""

    def allocate(count: int, size: int, device: torch.device) -> Tensor:
        return torch.empty(count, size, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        World(0, eager=1.0).install(patch)
        patch.setattr(gpu_offload, "has_device_memory", lambda device: True)
        patch.setattr(gpu_offload, "allocate_pinned", allocate)
        patch.setattr(ops, "prepare", lambda slab, spend=False: slab)
        yield


def made(folder: Path, kept: str, family: str = "llada2") -> Path:
    """A tiny checkpoint, plain or packed."""
    dtype = torch.float32 if kept == "plain" else torch.bfloat16
    whole = write_checkpoint(folder / "whole", family, dtype=dtype)
    if kept == "plain":
        return whole
    convert(whole, folder / "packed", ConversionTarget.parse(kept))
    return folder / "packed"


def opened(
    folder: Path,
    memory: str | ExpertMemoryConfig | None = None,
    host: str | None = None,
    **options: object,
) -> Engine:
    asked = (
        ExpertMemoryConfig.parse(memory, host_memory=host) if isinstance(memory, str) else memory
    )
    return coterie.load(folder, dtype="float32", device="cpu", expert_memory=asked, **options)


@pytest.mark.parametrize(
    ("family", "kept"),
    [("llada2", kept) for kept in ("plain", "bf16", "int8", "int4")]
    + [("llada-moe", "plain"), ("sdar-moe", "int4")],
)
def test_few_slots_answer_like_all_experts_resident(tmp_path: Path, family: str, kept: str) -> None:
    folder = made(tmp_path, kept, family)
    whole = opened(folder)
    assert whole.model.offload_store is None
    for memory in ("1", "35%", "15"):
        few = opened(folder, memory)
        for policy in ("vanilla", "resident-vote:beta=0.3,resident_bonus=0"):
            found, true = (one.generate(PROMPT, policy=policy, **ASKED) for one in (few, whole))
            assert found.tokens == true.tokens
        store, settled = few.model.offload_store, few.model.memory_plan
        assert store is not None
        assert settled is not None
        assert isinstance(store.fetcher, PinnedCopyFetcher)
        assert (store.capacity, store.experts_moved > 0) == (
            {"1": 1, "35%": 5, "15": 15}[memory],
            True,
        )
        assert settled.host_bytes == settled.layers * EXPERTS * store.expert_bytes


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_quantised_on_their_way_into_host_memory(tmp_path: Path, stacked: bool) -> None:
    folder = write_checkpoint(tmp_path, "llada2", stacked=stacked)
    few, whole = opened(folder, "35%", experts="int8"), opened(folder, experts="int8")
    assert few.generate(PROMPT, **ASKED).tokens == whole.generate(PROMPT, **ASKED).tokens


@pytest.mark.parametrize("kept", ["bf16", "int8", "int4"])
def test_less_host_memory_stands_before_a_packed_checkpoint(tmp_path: Path, kept: str) -> None:
    folder = made(tmp_path, kept)
    whole = opened(folder)
    few = opened(folder, "25%", "30KB")
    store, settled = few.model.offload_store, few.model.memory_plan
    assert store is not None
    assert settled is not None
    assert isinstance(store.fetcher, StagedFetcher)
    assert "some before the disk" in describe_memory_plan(settled)
    assert few.generate(PROMPT, **ASKED).tokens == whole.generate(PROMPT, **ASKED).tokens


def test_what_host_memory_cannot_hold_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path, "plain")
    with pytest.raises(CoterieError, match="packed checkpoint, whose experts"):
        opened(folder, "25%", "30KB")
    monkeypatch.setattr(gpu_offload, "free_memory", lambda device: 1000)
    with pytest.raises(CoterieError, match="1,000 are free; give --host-memory less"):
        opened(folder, "25%")
    with pytest.raises(CoterieError, match="--expert-memory auto: 1,000 bytes are free"):
        opened(folder, "auto")


def test_auto_takes_what_is_free_and_all_where_that_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path, "plain")
    engine = opened(folder, "auto")
    assert engine.model.offload_store is None
    assert engine.model.memory_plan is not None
    assert engine.model.memory_plan.host_bytes == 0
    spec = engine.model.spec
    size = gpu_offload.expert_layout(spec, torch.float32).size * len(spec.moe_layers)
    rest = non_expert_bytes(spec, torch.float32, 0)
    monkeypatch.setattr(gpu_offload, "free_memory", lambda device: int((rest + 8.5 * size) / 0.95))
    few = opened(folder, "auto")
    assert few.model.offload_store is not None
    assert few.model.offload_store.capacity == 8


def test_room_for_all_is_all_of_them_resident(tmp_path: Path) -> None:
    """Nothing is read by the host then, so that forwards can be kept as graphs."""
    folder = made(tmp_path, "int8")
    engine = opened(folder, "100%")
    assert engine.model.offload_store is None
    assert engine.model.memory_plan is not None
    assert "all 16 experts a layer fit" in describe_memory_plan(engine.model.memory_plan)
    with pytest.raises(CoterieError, match="--host-memory has no effect"):
        opened(folder, "100%", "30KB")


class Cudart:
    """As much of CUDA's runtime as pinning asks for."""

    def __init__(self, outcome: int) -> None:
        self.outcome, self.pinned = outcome, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.outcome:
            self.pinned[address] = size
        return self.outcome

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_pinned_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cudart(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    memory = pinned_memory.allocate_pinned(3, 4096, torch.device("cuda"))
    assert (memory.shape, memory.dtype) == ((3, 4096), torch.uint8)
    assert cuda.pinned == {memory.data_ptr(): 3 * 4096}
    part = memory[1, 5:]
    memory.fill_(9)
    del memory
    assert cuda.pinned
    assert bool((part == 9).all())
    del part
    assert not cuda.pinned


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def tells_once_more(*size: int, **how: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(2))
    monkeypatch.setattr(torch, "zeros", tells_once_more)
    with pytest.raises(CoterieError, match=r"3 experts of 4,096 bytes.*CUDA error 2"):
        pinned_memory.allocate_pinned(3, 4096, torch.device("cuda"))
