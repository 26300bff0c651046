"""A store on a device that computes later than asked: no slot is read too early or too late."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from asynchronous_device import World
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie.errors import CoterieError
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.cpu_experts import CpuExperts, TokenCounts
from coterie.offload.eviction import Lfu, Lru, Mask
from coterie.offload.fetchers import ExpertFetcher
from coterie.offload.gpu_fetchers import CopyStream, GpuFetcher
from coterie.offload.host_cache import HostCache
from coterie.offload.tiers import HostTier, Tier
from coterie.values import ExpertRequest, Routing, Slab

LAYERS, EXPERTS, SIZE = (1, 2), 12, 6
DEVICE = torch.device("cpu")
OLD = 250  # what lay where the slots are, and is still being read


def blobs(experts: int) -> dict[int, Tensor]:
    """Every expert of every layer says who it is, in each of its bytes."""
    return {
        layer: (torch.arange(experts)[:, None] * 2 + layer).expand(-1, SIZE).to(torch.uint8).clone()
        for layer in LAYERS
    }


def shown(memory: Tensor, slot_of: Tensor) -> Slab:
    return Slab(memory, memory, slot_of)


def by_copies(tier: HostTier) -> ExpertFetcher:
    return GpuFetcher(tier, CopyStream(DEVICE))


def by_relays(tier: Tier) -> ExpertFetcher:
    """Through memory for five experts of any layer: who comes there later takes others' places."""
    return GpuFetcher(HostCache(tier, torch.zeros(5, SIZE).byte()), CopyStream(DEVICE))


@dataclass
class Run:
    """A store in a world, and what was read where something else should have been."""

    world: World
    own: CachedExpertStore
    true: dict[int, Tensor]
    wrong: list[str]

    @staticmethod
    def of(
        world: World,
        make: Callable[[HostTier], ExpertFetcher],
        experts: int,
        capacity: int,
        lru: bool,
    ) -> Run:
        wrong: list[str] = []

        def allocate(slots: int, size: int) -> Tensor:
            memory = torch.full((slots, size), OLD, dtype=torch.uint8)

            def still_read() -> None:
                if not bool((memory == OLD).all()):
                    wrong.append("memory was overwritten while who had it before read it")

            world.compute(still_read)
            return memory

        true = blobs(experts)
        # What the courier reads is no copy: a source that goes early would be seen, too.
        rule = Lru() if lru else Lfu()
        own = CachedExpertStore(
            make(HostTier(true)), shown, allocate, experts, SIZE, capacity, rule
        )
        return Run(world, own, blobs(experts), wrong)

    def serve(self, layer: int, used: set[int]) -> Iterator[None]:
        """Compute a forward of a layer, slab by slab; a turn for others after each."""
        mask = torch.zeros(self.own.experts, dtype=torch.bool)
        mask[list(used)] = True
        ids = torch.tensor([sorted(used)] * 2, dtype=torch.int64)
        computed: list[int] = []
        for slab in self.own.serve(
            layer, ExpertRequest(mask, Routing(ids, ids.float(), mask, ids))
        ):
            here = [one for one in used if int(slab.slot_of[one]) >= 0 and one not in computed]
            computed += here
            self.world.compute(lambda slab=slab, here=here: self.check(layer, slab, here))
            yield
        if sorted(computed) != sorted(used):
            self.wrong.append(f"{sorted(used)} asked for, {computed} computed")

    def check(self, layer: int, slab: Slab, here: list[int]) -> None:
        assert isinstance(slab.down, Tensor)
        for expert in here:
            found, true = slab.down[slab.slot_of[expert]], self.true[layer][expert]
            if not torch.equal(found, true):
                self.wrong.append(f"expert {expert} of layer {layer} reads {found.tolist()}")

    def all_of(self, wishes: list[set[int]], dice: torch.Generator) -> list[str]:
        """Layers in turns, or, by lot, two layers beside each other."""
        waiting = [self.serve(LAYERS[at % 2], wish) for at, wish in enumerate(wishes)]
        while waiting:
            beside = 2 if float(torch.rand((), generator=dice)) < 0.3 else 1
            some, waiting = waiting[:beside], waiting[beside:]
            while some:
                some = [one for one in some if next(one, self) is not self]
        self.world.drain()
        return self.wrong


def wishes(experts: int, seed: int, count: int) -> tuple[list[set[int]], torch.Generator]:
    dice = torch.Generator().manual_seed(seed)
    many = torch.randint(0, experts + 1, (count,), generator=dice).tolist()
    return [set(torch.randperm(experts, generator=dice)[:one].tolist()) for one in many], dice


def outcome(
    seed: int,
    make: Callable[[HostTier], ExpertFetcher] = by_copies,
    *,
    experts: int = 9,
    capacity: int = 4,
    eager: float = 0.3,
    lru: bool = True,
    count: int = 8,
    aside: bool = False,
) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        world = World(seed, eager)
        world.install(patch)
        run = Run.of(world, make, experts, capacity, lru)
        if aside:
            everybody = torch.arange(experts)
            slabs = {layer: shown(blob, everybody) for layer, blob in run.true.items()}
            run.own.cpu_experts = CpuExperts(ByLot(seed), slabs)
        wrong = run.all_of(*wishes(experts, seed, count))
        # An abandoned forward leaves threads at work.
        assert isinstance(run.own.fetcher, GpuFetcher)
        run.own.fetcher._threads.shutdown()
        return wrong


@dataclass
class ByLot:
    """A part of those that are missed is computed elsewhere."""

    seed: int

    def select(self, missed_mask: Mask, token_counts: TokenCounts) -> Mask:
        assert bool((token_counts[missed_mask] == 2).all())
        self.seed += 1
        return missed_mask & (np.random.default_rng(self.seed).random(len(missed_mask)) < 0.4)

    def describe(self) -> str:
        return "random misses"


@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 13)),
    eager=st.sampled_from((0.0, 0.1, 0.5, 0.9)),
    lru=st.booleans(),
    aside=st.booleans(),
)
@law(120)
def test_no_slab_reads_other_bytes(
    seed: int, sizes: tuple[int, int], eager: float, lru: bool, aside: bool
) -> None:
    experts, capacity = sizes
    how = {"experts": experts, "capacity": capacity, "eager": eager, "lru": lru, "aside": aside}
    assert outcome(seed, **how) == []


@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(1, 12),
    capacity=st.integers(1, 13),
    eager=st.sampled_from((0.0, 0.5)),
)
@law(30)
def test_no_slab_of_a_staged_fetcher_reads_other_bytes(
    seed: int, experts: int, capacity: int, eager: float
) -> None:
    assert outcome(seed, by_relays, experts=experts, capacity=capacity, eager=eager) == []


@pytest.mark.parametrize("make", [by_copies, by_relays])
@pytest.mark.parametrize("left_out", ["wait_for_compute", "block_compute"])
def test_simulator_finds_a_missing_order(
    monkeypatch: pytest.MonkeyPatch, left_out: str, make: Callable[[HostTier], ExpertFetcher]
) -> None:
    """The world is harsh enough: without one of the two, some slab reads what it must not."""
    waits = left_out == "block_compute" and make is by_relays
    if waits:  # threads are done when their copies are: it is the host that must wait for them
        monkeypatch.setattr(CopyStream, left_out, lambda self, wait_on_host=None: None)
    else:
        monkeypatch.setattr(CopyStream, left_out, lambda self, *wait: [one() for one in wait])
    assert any(outcome(seed, make, eager=0.1) for seed in range(10))


def test_pinned_copies_never_block_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all experts in pinned memory a forward is only asked for: nothing has run by its end."""
    world = World(0, eager=0.0)
    world.install(monkeypatch)
    run = Run.of(world, by_copies, 9, 4, lru=True)
    for _ in run.serve(1, set(range(9))):
        pass
    assert run.own.traffic_log.traffic().stall_seconds == 0
    assert not bool((run.own._memory[1] < OLD).any())
    world.drain()
    assert run.wrong == []
    assert (
        run.own.traffic_log.traffic().stall_seconds == 0.003
    )  # of three waves that are waited for, a millisecond each


def test_copies_of_the_next_wave_overlap_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits are being computed, and go on being; meanwhile who is missing arrives in free slots."""
    world = World(0, eager=0.0)
    world.install(monkeypatch)
    run = Run.of(world, by_copies, 6, 4, lru=True)
    for _ in run.serve(1, {0, 1}):
        world.drain()
    over: list[bool] = []
    served = run.serve(1, {0, 1, 2, 3})
    next(served)
    world.computing.ask(lambda: None, when=lambda: bool(over))
    world.drain()
    memory = run.own._memory[1][:, 0].tolist()
    assert sorted(memory) == sorted(run.true[1][:4, 0].tolist())
    over.append(True)
    assert len(list(served)) == 1
    assert run.wrong == []


@pytest.mark.parametrize("make", [by_copies, by_relays])
def test_abandoned_forward_leaves_a_correct_store(
    make: Callable[[HostTier], ExpertFetcher],
) -> None:
    for seed in range(12):
        with pytest.MonkeyPatch.context() as patch:
            world = World(seed, eager=0.1)
            world.install(patch)
            run = Run.of(world, make, 9, 4, lru=True)
            for turn in range(4):
                left = run.serve(LAYERS[turn % 2], set(range(9)))
                for _ in range(turn % 3 + 1):
                    next(left)
                left.close()
                for _ in run.serve(LAYERS[turn % 2], {turn, turn + 3, turn + 5}):
                    pass
            world.drain()
            assert run.wrong == []


def test_failing_tier_is_an_error_and_the_next_forward_is_right() -> None:
    class Failing:
        def __init__(self, tier: HostTier) -> None:
            self.tier, self.broken, self.lock = tier, True, threading.Lock()

        def fetch(self, layer: int, expert: int, into: Tensor) -> str:
            if self.broken and expert == 5:
                raise CoterieError("expert 5 cannot be read")
            return self.tier.fetch(layer, expert, into)

    failing = Failing(HostTier(blobs(9)))
    with pytest.MonkeyPatch.context() as patch:
        world = World(3, eager=0.1)
        world.install(patch)
        run = Run.of(
            world,
            lambda tier: by_relays(failing),
            9,
            4,
            lru=True,
        )
        for _ in run.serve(1, {0, 1, 2}):
            pass
        with pytest.raises(CoterieError, match="expert 5"):
            list(run.serve(1, {1, 4, 5}))
        resident = run.own.resident(1)
        assert resident is not None
        assert not bool(resident.any())
        failing.broken = False
        for _ in run.serve(1, {1, 4, 5}):
            pass
        world.drain()
        assert run.wrong == []
