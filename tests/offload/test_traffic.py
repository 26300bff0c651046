"""What a store says that it moved: every byte once, and what vanilla would have moved beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

import coterie.offload.traffic_log as ledgers
from coterie.offload.eviction import Lru
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.simulated_store import SIMULATED_TIER, CacheSimulator, SimulatedCacheStore
from coterie.offload.slot_table import Slots
from coterie.offload.traffic import Traffic, Transfer
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertRequest, Routing, Slab, expert_mask

LAYERS = (1, 2, 4)
SIZE = 100
NOTHING = Slab(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True)
class Asked:
    """A layer's call: who is used, and whom the tokens would have taken."""

    layer: int
    used: Tensor
    own: Tensor

    @property
    def demand(self) -> ExpertRequest:
        return ExpertRequest(
            self.used, Routing(self.own, torch.ones(self.own.shape), self.used, self.own)
        )


def drawn(experts: int, forwards: int, seed: int) -> list[Asked]:
    """Coresets that are not what the tokens would have taken."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for at in range(forwards * len(LAYERS)):
        own = torch.randint(experts, (4, 2), generator=draw)
        used = torch.rand(experts, generator=draw) < 0.3
        made.append(Asked(LAYERS[at % len(LAYERS)], used, own))
    return made


def imagined(experts: int, capacity: int, *, compared: bool = True) -> SimulatedCacheStore:
    whole = ResidentExpertStore(dict.fromkeys(LAYERS, NOTHING))
    store = SimulatedCacheStore(whole, CacheSimulator(experts, capacity), SIZE)
    if compared:
        store.traffic_log.track_vanilla()
    return store


def serve(store: SimulatedCacheStore, asked: list[Asked]) -> None:
    for one in asked:
        list(store.serve(one.layer, one.demand))


def loads(asked: list[Asked], experts: int, capacity: int, *, own: bool) -> int:
    """What LRU moves for these, plainly."""
    slots = {layer: Slots(experts, capacity, Lru()) for layer in LAYERS}
    found = 0
    for one in asked:
        mask = expert_mask(one.own.flatten(), experts) if own else one.used
        found += sum(len(wave.loads) for wave in slots[one.layer].serve(mask.numpy()))
    return found


@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**20))
@law(40)
def test_log_counts_moved_experts_and_vanilla_misses(
    experts: int, capacity: int, forwards: int, seed: int
) -> None:
    asked = drawn(experts, forwards, seed)
    store = imagined(experts, capacity)
    serve(store, asked)
    found = store.traffic_log.traffic()
    used = sum(int(one.used.sum()) for one in asked)
    assert (found.experts_used, found.experts_moved) == (
        used,
        loads(asked, experts, capacity, own=False),
    )
    assert found.transfers.get(SIMULATED_TIER, Transfer()) == Transfer(
        found.experts_moved, found.experts_moved * SIZE
    )
    assert found.vanilla_misses == loads(asked, experts, capacity, own=True)
    assert found.hits == found.experts_used - found.experts_moved
    assert (found.bytes_saved, found.bytes_moved) == (found.hits * SIZE, found.experts_moved * SIZE)
    assert found.bytes_saved_vs_vanilla == (found.vanilla_misses - found.experts_moved) * SIZE


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**20), st.integers(0, 5))
@law(25)
def test_forwards_add_up_to_the_total(experts: int, capacity: int, seed: int, early: int) -> None:
    """Six forwards; the traffic is read after ``early`` of them."""
    asked = drawn(experts, 6, seed)
    store = imagined(experts, capacity)
    before = store.traffic_log.traffic()
    for place in range(6):
        if place == early:
            before = store.traffic_log.traffic()
        store.traffic_log.begin_forward("commit" if place == 3 else "decode", (7,), (place // 2,))
        serve(store, asked[place * len(LAYERS) : (place + 1) * len(LAYERS)])
        store.traffic_log.end_forward()
    lines, whole = store.traffic_log.forwards, store.traffic_log.traffic()
    assert [line.number for line in lines] == list(range(6))
    assert [line.blocks for line in lines] == [(0,), (0,), (1,), (1,), (2,), (2,)]
    total = sum((line.traffic for line in lines[1:]), start=lines[0].traffic)
    assert counted(total) == counted(whole)
    assert total.seconds == pytest.approx(whole.seconds)
    assert whole.forwards == 5  # one only wrote keys
    later = sum((line.traffic for line in lines[early + 1 :]), start=lines[early].traffic)
    assert counted(later) == counted(whole - before)


def counted(traffic: Traffic) -> Traffic:
    """All but what a clock told."""
    return replace(traffic, seconds=0.0, stall_seconds=0.0)


def test_traffic_after_a_reset_repeats() -> None:
    asked = drawn(9, 4, 3)
    store = imagined(9, 4)
    serve(store, asked)
    once = store.traffic_log.traffic()
    store.reset()
    assert store.traffic_log.traffic() == once
    serve(store, asked)
    assert store.traffic_log.traffic() - once == once


def test_vanilla_routing_has_vanilla_misses() -> None:
    asked = [Asked(one.layer, expert_mask(one.own.flatten(), 9), one.own) for one in drawn(9, 5, 4)]
    store = imagined(9, 4)
    serve(store, asked)
    found = store.traffic_log.traffic()
    assert (found.vanilla_misses, found.fraction_saved) == (found.experts_moved, 0.0)


def test_vanilla_must_be_tracked_from_the_start() -> None:
    store = imagined(9, 4, compared=False)
    serve(store, drawn(9, 2, 5))
    found = store.traffic_log.traffic()
    assert (found.vanilla_misses, found.fraction_saved, found.bytes_saved_vs_vanilla) == (
        None,
        None,
        None,
    )
    assert {line.traffic.vanilla_misses for line in store.traffic_log.forwards} == {None}
    with pytest.raises(RuntimeError, match="empty"):
        store.traffic_log.track_vanilla()


def test_log_has_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many forwards it keeps the sum; what waits for vanilla goes through its memory in time."""
    store, plain = imagined(9, 4), imagined(9, 4)
    serve(plain, asked := drawn(9, 50, 6))
    monkeypatch.setattr(ledgers, "MAX_PENDING_IDS", 40)
    store.traffic_log._finished = type(store.traffic_log._finished)(maxlen=5)
    most = 0
    for one in asked:
        serve(store, [one])
        most = max(most, len(store.traffic_log._pending))
    assert most <= 40 // 8 + 1
    assert store.traffic_log.traffic() == plain.traffic_log.traffic()
    assert [line.number for line in store.traffic_log.forwards] == list(range(44, 49))


def test_tiers_and_stalls_are_counted_separately() -> None:
    clock = iter((0.25, 0.25))
    ledger = TrafficLog(SIZE, lambda _: Slots(4, 2, Lru()), lambda: next(clock))
    ledger.begin_forward("decode")
    ledger.log_layer(0, ExpertRequest(torch.ones(4, dtype=torch.bool)), used=4, hits=1)
    ledger.log_transfer("host", 2)
    ledger.log_transfer("disk")
    ledger.log_transfer("disk", total_bytes=SIZE // 2)  # in fewer bits
    ledger.end_forward()
    found = ledger.traffic()
    assert found.transfers == {"host": Transfer(2, 200), "disk": Transfer(2, 150)}
    assert (found.bytes_moved, found.bytes_saved, found.hit_rate) == (350, 50, 0.25)
    assert (found.stall_seconds, found.stall_fraction) == (0.25, 0.25 / found.seconds)
