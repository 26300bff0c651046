"""Experts behind a GPU's slots: loaded into host memory, copied when needed, the same answers.

The GPU is imagined: a CPU whose copies go through a queue, done as soon as they are asked for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from offload_cases import (
    OPTIONS,
    PROMPT,
    cached_store_of,
    load_engine,
    plain_or_packed_checkpoint,
    simulate_gpu,
)
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.loading import gpu_offload
from coterie.loading.expert_memory import ExpertMemoryConfig, non_expert_bytes
from coterie.offload import pinned_memory
from coterie.offload.gpu_fetchers import GpuFetcher
from coterie.offload.host_cache import HostCache
from coterie.offload.tiers import HostTier
from coterie.testing import write_checkpoint

pytestmark = pytest.mark.usefixtures("gpu")
EXPERTS = 16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpu(monkeypatch)


def host_memory(size: str, capacity: str = "25%") -> ExpertMemoryConfig:
    return ExpertMemoryConfig.parse(capacity, host_memory=size)


def describe(engine: Engine) -> str:
    return " ".join(engine.model.placement.describe())


@pytest.mark.parametrize(
    ("family", "kept", "memories"),
    [
        ("llada2", "plain", ("1", "35%", "15")),
        ("llada2", "bf16", ("35%",)),
        pytest.param("llada2", "int4", ("35%",), marks=pytest.mark.slow),
        ("sdar-moe", "int8", ("35%",)),
    ],
)
def test_few_slots_answer_like_all_experts_resident(
    tmp_path: Path, family: str, kept: str, memories: tuple[str, ...]
) -> None:
    folder = plain_or_packed_checkpoint(tmp_path, kept, family)
    whole = load_engine(folder)
    assert whole.model.store.traffic_log is None
    expected = {
        policy: whole.generate(PROMPT, policy=policy, **OPTIONS).tokens
        for policy in ("vanilla", "resident-vote:beta=0.3,resident_bonus=0")
    }
    for memory in memories:
        few = load_engine(folder, memory)
        for policy, tokens in expected.items():
            assert few.generate(PROMPT, policy=policy, **OPTIONS).tokens == tokens
        store, plan = cached_store_of(few), few.model.placement.plan
        assert plan is not None
        assert isinstance(store.fetcher, GpuFetcher)
        assert isinstance(store.fetcher.source, HostTier)
        assert (store.capacity, store.traffic_log.traffic().experts_moved > 0) == (
            {"1": 1, "35%": 5, "15": 15}[memory],
            True,
        )
        assert plan.host_bytes == plan.layers * EXPERTS * store.expert_bytes


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_quantised_on_their_way_into_host_memory(tmp_path: Path, stacked: bool) -> None:
    folder = write_checkpoint(tmp_path, "llada2", stacked=stacked)
    few, whole = (
        load_engine(folder, "35%", expert_dtype="int8"),
        load_engine(folder, expert_dtype="int8"),
    )
    assert few.generate(PROMPT, **OPTIONS).tokens == whole.generate(PROMPT, **OPTIONS).tokens


@pytest.mark.parametrize("kept", ["bf16", "int8", "int4"])
def test_less_host_memory_stands_before_a_packed_checkpoint(tmp_path: Path, kept: str) -> None:
    folder = plain_or_packed_checkpoint(tmp_path, kept)
    whole = load_engine(folder)
    few = load_engine(folder, host_memory("30KB"))
    fetcher = cached_store_of(few).fetcher
    assert isinstance(fetcher, GpuFetcher)
    assert isinstance(fetcher.source, HostCache)
    assert "some, in front of the disk" in describe(few)
    assert few.generate(PROMPT, **OPTIONS).tokens == whole.generate(PROMPT, **OPTIONS).tokens


def test_too_little_host_memory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_or_packed_checkpoint(tmp_path, "plain")
    with pytest.raises(CoterieError, match="packed checkpoint"):
        load_engine(folder, host_memory("30KB"))
    with pytest.raises(CoterieError, match="60 bytes are less than one expert"):
        load_engine(folder, host_memory("60B"))
    monkeypatch.setattr(gpu_offload, "free_memory", lambda device: 1000)
    with pytest.raises(CoterieError, match=r"1,000 are free.*host_memory"):
        load_engine(folder, "25%")
    with pytest.raises(CoterieError, match="expert_memory=auto`: 1,000 bytes are free"):
        load_engine(folder, "auto")


def test_auto_takes_free_gpu_memory_or_all_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_or_packed_checkpoint(tmp_path, "plain")
    engine = load_engine(folder, "auto")
    assert engine.model.store.traffic_log is None
    assert engine.model.placement.plan is not None
    assert engine.model.placement.plan.host_bytes == 0
    spec = engine.model.spec
    size = gpu_offload.expert_layout(spec, torch.float32).size * len(spec.moe_layers)
    rest = non_expert_bytes(spec, torch.float32, 0)
    monkeypatch.setattr(gpu_offload, "free_memory", lambda device: int((rest + 8.5 * size) / 0.95))
    few = load_engine(folder, "auto")
    assert few.model.store.capacity == 8


def test_room_for_all_is_all_of_them_resident(tmp_path: Path) -> None:
    """Nothing is read by the host then, so that forwards can be kept as graphs."""
    folder = plain_or_packed_checkpoint(tmp_path, "int8")
    engine = load_engine(folder, "100%")
    assert engine.model.store.traffic_log is None
    assert "all 16 experts per layer fit" in describe(engine)
    with pytest.raises(CoterieError, match="host_memory` has no effect"):
        load_engine(folder, host_memory("30KB", "100%"))


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
