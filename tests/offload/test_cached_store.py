"""A store that fetches: the same numbers as one that holds all, whatever comes and goes."""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import (
    HIDDEN,
    LAYERS,
    OPTIONS,
    PROMPT,
    SIZE,
    FailingTier,
    cached_store,
    cached_store_of,
    expert_blobs,
    fp32_slab,
    load_engine,
    moe_output,
    needs_kernels,
    packed_checkpoint,
    random_routings,
)
from policy_strategies import law
from torch import Tensor

from coterie.checkpoints.manifest import MANIFEST
from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.offload.eviction import Eviction, Lfu, Lru
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.tiers import PAGE_BYTES, DiskTier, ExpertFileSpan, HostTier, Tier
from coterie.testing import FAMILY_CONFIGS
from coterie.values import ExpertRequest, expert_mask


@given(
    st.integers(1, 12), st.integers(1, 14), st.integers(0, 2**20), st.sampled_from((Lru(), Lfu()))
)
@law(40)
def test_offloaded_equals_resident(experts: int, capacity: int, seed: int, rule: Eviction) -> None:
    """Layers take turns; equal to rounding, for waves add in another order."""
    whole = expert_blobs(experts, seed)
    everyone = torch.arange(experts)
    resident = ResidentExpertStore(
        {layer: fp32_slab(one, everyone) for layer, one in whole.items()}
    )
    own = cached_store(HostTier(whole), experts, capacity, rule)
    for place, routing in enumerate(random_routings(experts, seed, count=6)):
        layer = LAYERS[place % 2]
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(place))
        found, true = (moe_output(one, layer, routing, x) for one in (own, resident))
        torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)
    traffic = own.traffic_log.traffic()
    assert traffic.forwards == 3
    assert traffic.experts_used == sum(
        int(r.used.sum()) for r in random_routings(experts, seed, count=6)
    )
    if capacity >= experts:
        seen = [r.used for r in random_routings(experts, seed, count=6)]
        assert traffic.experts_moved == sum(
            int((seen[at] | seen[at + 2] | seen[at + 4]).sum()) for at in (0, 1)
        )


@dataclass
class Slow:
    """A tier that counts who reads at once, and what it is asked to overwrite."""

    tier: Tier
    seen: Callable[[Tensor], None] = lambda into: None
    asked: int = 0
    reading: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        with self.lock:
            self.asked += 1
            self.reading += 1
            self.most = max(self.most, self.reading)
            self.seen(into)
        time.sleep(0.002)
        found = self.tier.fetch(layer, expert, into)
        with self.lock:
            self.reading -= 1
        return found


def test_slots_are_not_overwritten_during_compute() -> None:
    """Twelve experts through five slots: while a slab is out, its bytes stand."""
    slow = Slow(HostTier(expert_blobs(12)))
    own = cached_store(slow, 12, 5)
    for _ in range(3):
        served = 0
        for slab in own.serve(1, ExpertRequest(torch.ones(12, dtype=torch.bool))):
            slots = slab.slot_of[slab.slot_of >= 0]
            before = slab.down[slots].clone()
            time.sleep(0.004)
            assert torch.equal(slab.down[slots], before)
            assert not bool(before.isnan().any())
            served += len(slots)
        assert served == 12
    assert slow.most > 1
    assert own.traffic_log.traffic().stall_seconds > 0


def test_cached_experts_are_computed_during_fetches() -> None:
    slow = Slow(HostTier(expert_blobs(8)))
    own = cached_store(slow, 8, 6)
    first, both = torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    first[:3] = True
    both[:5] = True
    list(own.serve(1, ExpertRequest(first)))
    waves = own.serve(1, ExpertRequest(both))
    slab = next(waves)
    assert (slab.slot_of >= 0).tolist() == first.tolist()
    deadline = time.monotonic() + 60
    while slow.asked < 5:  # the two that are missing come without anybody asking for more
        assert time.monotonic() < deadline
        time.sleep(0.001)
    (rest,) = waves
    assert (rest.slot_of >= 0).tolist() == (both & ~first).tolist()


def test_resident_slab_is_rebuilt_after_a_fetch() -> None:
    whole = expert_blobs(6)
    own, true = cached_store(HostTier(whole), 6, 3), fp32_slab(whole[1], torch.arange(6))
    for wanted in ({0, 1, 2}, {0, 1}, {1, 2}, {1, 4}, {4}, {1, 4}, {0, 1}, {0}):
        used = expert_mask(torch.tensor(sorted(wanted)), 6)
        seen: set[int] = set()
        for slab in own.serve(1, ExpertRequest(used)):
            here = [one for one in range(6) if int(slab.slot_of[one]) >= 0]
            assert torch.equal(slab.down[slab.slot_of[here]], true.down[here])
            seen |= set(here)
        assert seen >= wanted
    assert own.traffic_log.traffic().experts_moved == 5


def test_abandoned_store_fetches_again() -> None:
    whole = expert_blobs(9)
    own = cached_store(HostTier(whole), 9, 3)
    served = own.serve(1, ExpertRequest(torch.ones(9, dtype=torch.bool)))
    next(served)
    served.close()
    resident = own.resident(1)
    assert resident is not None
    assert not bool(resident.any())
    x, (routing,) = torch.randn(5, HIDDEN), random_routings(9, 4, count=1)
    true = ResidentExpertStore({1: fp32_slab(whole[1], torch.arange(9))})
    torch.testing.assert_close(moe_output(own, 1, routing, x), moe_output(true, 1, routing, x))


def on_disk(folder: Path, experts: int = 6) -> tuple[DiskTier, dict[int, Tensor]]:
    whole, layers = expert_blobs(experts), {}
    for layer, one in whole.items():
        path = folder / f"layer-{layer}"
        path.write_bytes(b"before " + one.numpy().tobytes() + b" behind")
        sums = tuple(zlib.crc32(blob.numpy().tobytes()) for blob in one)
        layers[layer] = ExpertFileSpan(path, 7, SIZE, sums)
    return DiskTier(layers), whole


def test_a_disk_gives_what_was_written(tmp_path: Path) -> None:
    tier, whole = on_disk(tmp_path)
    into = torch.zeros(SIZE, dtype=torch.uint8)
    for layer, one in whole.items():
        for expert in range(6):
            tier.fetch(layer, expert, into)
            assert torch.equal(into, one[expert])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[: 7 + 4 * SIZE + 3]), "ends after 3 of"),
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), "wrong checksum"),
    ],
)
def test_a_disk_that_fails_gives_an_error_and_never_other_weights(
    tmp_path: Path, harm: Callable[[Path], object], told: str
) -> None:
    """Experts 0 and 1 were read before the file was harmed; then 4 is asked for, and again."""
    tier, whole = on_disk(tmp_path)
    own = cached_store(tier, 6, 3)
    list(own.serve(1, ExpertRequest(torch.tensor([True, True, False, False, False, False]))))
    path = tier.spans[1].path
    good = path.read_bytes()
    harm(path)
    for _ in range(2):
        with pytest.raises(CoterieError, match=f"expert 4 of layer 1.*{told}"):
            list(
                own.serve(1, ExpertRequest(torch.tensor([False, False, False, False, True, False])))
            )
    path.write_bytes(good)
    (slab,) = own.serve(1, ExpertRequest(torch.tensor([False, False, False, False, True, False])))
    assert torch.equal(slab.down[slab.slot_of[4]], fp32_slab(whole[1], torch.arange(6)).down[4])


PAGES = 2  # of an expert, below


def paged(folder: Path) -> tuple[DiskTier, Tensor, Tensor]:
    """A layer of six experts in whole pages, and memory for one that begins where a page does."""
    whole = torch.randint(256, (6, PAGES * PAGE_BYTES), dtype=torch.uint8)
    (folder / "layer").write_bytes(bytes(PAGE_BYTES) + whole.numpy().tobytes())
    sums = tuple(zlib.crc32(one.numpy().tobytes()) for one in whole)
    into = torch.frombuffer(mmap.mmap(-1, PAGES * PAGE_BYTES), dtype=torch.uint8)
    return (
        DiskTier({1: ExpertFileSpan(folder / "layer", PAGE_BYTES, PAGES * PAGE_BYTES, sums)}),
        whole,
        into,
    )


@pytest.mark.parametrize("past", [True, False])
def test_whole_pages_are_read_past_the_cache_where_the_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past: bool
) -> None:
    tier, whole, into = paged(tmp_path)
    real_open = os.open
    flags: list[int] = []

    def counted(path: Path, flag: int) -> int:
        flags.append(flag)
        if not past:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flag)

    monkeypatch.setattr(os, "open", counted)
    for expert, one in enumerate(whole):
        tier.fetch(1, expert, into)
        assert torch.equal(into, one)
    tried = 6 if hasattr(os, "O_DIRECT") else 0
    assert len([flag for flag in flags if flag != os.O_RDONLY]) == tried


@pytest.mark.parametrize(
    "left", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 7, 2 * PAGE_BYTES - 1]
)
def test_a_file_that_ends_inside_an_expert_is_an_error_in_pages_too(
    tmp_path: Path, left: int
) -> None:
    tier, _, into = paged(tmp_path)
    os.truncate(tmp_path / "layer", PAGE_BYTES + 3 * PAGES * PAGE_BYTES + left)
    tier.fetch(1, 2, into)
    with pytest.raises(
        CoterieError, match=f"expert 3 of layer 1 ends after {left} of {2 * PAGE_BYTES}"
    ):
        tier.fetch(1, 3, into)


@needs_kernels
@pytest.mark.parametrize(
    ("family", "kind", "memories"),
    [
        ("llada2", "int8", ("1", "35%", "100%")),
        pytest.param("llada2", "bf16", ("1",), marks=pytest.mark.slow),
        pytest.param("llada2", "int4", ("35%",), marks=pytest.mark.slow),
        *((family, "int8", ("35%",)) for family in FAMILY_CONFIGS if family != "llada2"),
    ],
)
def test_a_model_answers_the_same_with_few_experts_in_memory(
    tmp_path: Path, family: str, kind: str, memories: tuple[str, ...]
) -> None:
    folder = packed_checkpoint(tmp_path, family, kind)
    rule = {"unmask": "renoise:steps=3"} if family == "diffusion-gemma" else {}
    options = OPTIONS | rule
    whole = load_engine(folder)
    expected = {
        policy: whole.generate(PROMPT, policy=policy, **options).tokens
        for policy in ("vanilla", "des-vote:beta=0.3")
    }
    for memory in memories:
        few = load_engine(folder, memory)
        for policy, tokens in expected.items():
            assert few.generate(PROMPT, policy=policy, **options).tokens == tokens
        own = cached_store_of(few)
        moved = own.traffic_log.traffic().experts_moved
        assert (own.capacity, moved > 0) == ({"1": 1, "35%": 5, "100%": 16}[memory], True)
        assert (moved <= 16 * len(few.model.spec.moe_layers)) == (memory == "100%")


@needs_kernels
def test_resident_vote_raises_the_hit_rate(tmp_path: Path) -> None:
    folder = packed_checkpoint(tmp_path)
    hits = []
    for lam in (0, 8):
        engine = load_engine(folder, "35%")
        engine.generate(PROMPT, policy=f"resident-vote:beta=0.3,lam={lam},eps=0.5", **OPTIONS)
        hits.append(cached_store_of(engine).traffic_log.traffic().hit_rate)
    assert hits[1] > hits[0]


@needs_kernels
def test_the_command_says_what_is_in_memory_and_what_was_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(packed_checkpoint(tmp_path))
    words = ["generate", "5 17 33", "-m", folder, "-n", "8", "--block", "8", "--json"]
    assert run([*words, "--expert-memory", "5"]) == 0
    said = capsys.readouterr()
    assert "5 of 16 experts per layer in memory" in said.err
    told = json.loads(said.out)["expert_traffic"]
    assert (told["slots"], told["experts_moved"] <= told["experts_used"]) == (5, True)
    assert told["bytes_moved"] % told["experts_moved"] == 0
    assert run(words) == 0
    assert "expert_traffic" not in json.loads(capsys.readouterr().out)


@needs_kernels
def test_checkpoints_without_offload_are_one_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed_checkpoint(tmp_path)
    whole = str(tmp_path / "whole")
    for model, memory, told in (
        (whole, "35%", "packed checkpoint"),
        (str(folder), "0.1%", "less than one expert in each of 2 layers"),
        (str(folder), "lots", "35%"),
    ):
        assert run(["generate", "5 17", "-m", model, "--expert-memory", memory]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert told in said.err
    listed = json.loads((folder / MANIFEST).read_text())
    for tensor in listed["tensors"].values():
        tensor.pop("crc32", None)
    (folder / MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(CoterieError, match="no checksums of the experts"):
        load_engine(folder, "35%")


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate"), RuntimeError("no")])
def test_failed_allocation_is_an_error_and_can_be_retried(error: Exception) -> None:
    own, left = cached_store(HostTier(expert_blobs(4)), 4, 2), [error]
    allocate = own.allocate

    def grudging(slots: int, size: int) -> Tensor:
        if left:
            raise left.pop()
        return allocate(slots, size)

    own.allocate = grudging
    with pytest.raises(CoterieError, match=f"no memory for 2 experts of {SIZE} bytes"):
        own.resident(1)
    assert own.resident(1) is not None


def test_unreadable_warm_start_expert_fails_once() -> None:
    tier = FailingTier(HostTier(expert_blobs(4)), {2})
    own = cached_store(tier, 4, 3, warm_votes={1: np.array([0.0, 1.0, 2.0, 0.5])})
    with pytest.raises(CoterieError, match="expert 2"):
        own.resident(1)
    here = own.resident(1)
    assert here is not None
    assert not bool(here.any())
    list(own.serve(1, ExpertRequest(torch.tensor([True, True, False, False]))))
