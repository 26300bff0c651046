"""Experts in two precisions: each is computed in the one that its placement says."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import (
    HIDDEN,
    LAYERS,
    cached_store,
    expert_blobs,
    fp32_slab,
    moe_output,
    random_routings,
    request_for,
)
from policy_strategies import law
from precision_reference import DECAY, PrecisionReference, experts_moved
from torch import Tensor

from coterie.errors import CoterieError
from coterie.offload.eviction import ByVotes, Eviction, FloatArray, Lru
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.mixed_precision_store import MixedPrecisionStore
from coterie.offload.precision_stats import PrecisionErrors, vote_shares
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.tiers import HostTier, Tier
from coterie.values import ExpertRequest, Routing, Slab


@dataclass
class Whimsical:
    """A tier that takes as long as it likes, and fails where it is told to."""

    tier: Tier
    draw: random.Random
    broken: set[int] = field(default_factory=set)

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        time.sleep(self.draw.random() * 1e-3)
        if expert in self.broken:
            raise CoterieError(f"expert {expert} of layer {layer} is broken")
        return self.tier.fetch(layer, expert, into)


@dataclass(frozen=True)
class Room:
    """Places in either precision, and upgrades a forward."""

    fine: int
    coarse: int
    upgrades: int
    mass: float = 0.0


ROOMS = st.builds(
    Room,
    st.integers(1, 11),
    st.integers(1, 11),
    st.integers(0, 4),
    st.sampled_from((0.0, 0.3, 0.6, 1.0)),
)


def mixed(
    high: Tier,
    low: Tier,
    experts: int,
    room: Room,
    *,
    eviction: Eviction | None = None,
    warm: dict[int, FloatArray] | None = None,
    errors: dict[int, PrecisionErrors] | None = None,
) -> MixedPrecisionStore:
    return MixedPrecisionStore(
        cached_store(high, experts, room.fine, eviction or ByVotes(), warm_votes=warm or {}),
        cached_store(low, experts, room.coarse),
        room.upgrades,
        room.mass,
        errors=errors or {},
    )


def blended(fine: Slab, coarse: Slab, who: set[int]) -> ResidentExpertStore:
    """All experts in memory, these in the finer precision."""
    chosen = torch.tensor([expert in who for expert in range(len(fine.slot_of))])[:, None, None]
    gate_up, down = (
        torch.where(chosen, getattr(fine, part), getattr(coarse, part))
        for part in ("gate_up", "down")
    )
    return ResidentExpertStore({layer: Slab(gate_up, down, fine.slot_of) for layer in LAYERS})


@given(st.integers(1, 10), ROOMS, st.booleans(), st.integers(0, 2**20))
@law(40)
def test_store_matches_the_precision_reference(
    experts: int, room: Room, warmed: bool, seed: int
) -> None:
    """Whatever the sizes, the places, the upgrades a forward, and when they come."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    best, rough = expert_blobs(experts, seed), expert_blobs(experts, seed + 1)
    warm = {layer: numbers.integers(0, 4, experts) / 1.0 for layer in LAYERS if warmed}
    own = mixed(
        Whimsical(HostTier(best), draw),
        Whimsical(HostTier(rough), draw),
        experts, room, warm=warm, eviction=ByVotes(DECAY),
    )  # fmt: skip
    everyone, plain = torch.arange(experts), {}
    for layer in LAYERS:
        votes = [float(vote) for vote in warm.get(layer, np.zeros(experts))]
        order = sorted(range(experts), key=lambda e: (-votes[e], e))
        first = {e for e in order[: room.fine] if votes[e]}
        plain[layer] = PrecisionReference(room.fine, room.upgrades, room.mass, first, votes)
    for place, routing in enumerate(random_routings(experts, seed, count=8)):
        layer = LAYERS[draw.randrange(2)]
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(place))
        used = routing.used.tolist()
        plain[layer].before_forward(used, [float(asked) for asked in used])
        true = blended(
            fp32_slab(best[layer], everyone), fp32_slab(rough[layer], everyone), plain[layer].high
        )
        torch.testing.assert_close(
            moe_output(own, layer, routing, x), moe_output(true, layer, routing, x),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip
        plain[layer].after_forward(used)


def test_higher_scores_are_never_evicted() -> None:
    own = mixed(
        HostTier(expert_blobs(6)),
        HostTier(expert_blobs(6)),
        6,
        Room(2, 6, 2),
        eviction=ByVotes(DECAY),
    )
    for wanted in ((0, 1), (0, 1), (0, 1, 2), (3,), (4, 5)):
        list(own.serve(1, request_for(6, *wanted)))
        assert own.high.layer_cache(1).slots.resident.tolist() == [True, True, *[False] * 4]
    assert own.precision_stats.promotions == experts_moved(own)["host, high"] == 2
    for _ in range(4):
        list(own.serve(1, request_for(6, 5)))
    assert own.high.layer_cache(1).slots.resident.tolist() == [True, *[False] * 4, True]


def test_without_promotions_precisions_never_change() -> None:
    votes = np.array([0.0, 3.0, 1.0, 2.0, 0.0])
    own = mixed(
        HostTier(expert_blobs(5)), HostTier(expert_blobs(5)), 5, Room(2, 5, 0), warm={1: votes}
    )
    for routing in random_routings(5, 3, count=6):
        list(own.serve(1, ExpertRequest(routing.used)))
        assert own.high.layer_cache(1).slots.resident.tolist() == [False, True, False, True, False]
    assert experts_moved(own) == {"host, high": 2, "host, low": 3}


def test_the_loss_bound_is_vote_share_times_error() -> None:
    errors = {1: PrecisionErrors(np.full(4, 0.01), np.array([0.1, 0.2, 0.3, 0.4]))}
    own = mixed(
        HostTier(expert_blobs(4)), HostTier(expert_blobs(4)), 4, Room(1, 4, 0),
        warm={1: np.array([0.0, 0.0, 0.0, 1.0])}, errors=errors,
    )  # fmt: skip
    list(own.serve(1, request_for(4, 1, 3)))
    assert own.precision_stats.forwards == 1
    assert own.precision_stats.high_share_sum == pytest.approx(0.5)
    assert own.precision_stats.loss_bound == pytest.approx(0.5 * 0.2 + 0.5 * 0.01)
    assert own.precision_stats.loss_rms == pytest.approx((0.5 * 0.2**2 + 0.5 * 0.01**2) ** 0.5)


def test_vote_mass_is_served_in_high_precision_and_bounds_the_loss() -> None:
    """Where they have places."""
    experts, mass = 12, 0.6
    errors = {1: PrecisionErrors(np.full(experts, 0.01), np.full(experts, 0.1))}
    room = Room(experts, experts, 0, mass)
    own = mixed(
        HostTier(expert_blobs(12)), HostTier(expert_blobs(12, 1)), experts, room, errors=errors
    )
    for place, routing in enumerate(random_routings(experts, 5, count=6)):
        list(own.serve(1, ExpertRequest(routing.used)))
        assert own.precision_stats.high_share_sum >= (place + 1) * mass - 1e-9
    assert own.precision_stats.loss_bound <= mass * 0.01 + (1 - mass) * 0.1
    assert own.precision_stats.high_share_sum < 6


def test_unused_experts_have_no_vote_share() -> None:
    votes, used = np.array([3.0, 1.0, 4.0, 0.0]), np.array([True, True, False, True])
    assert vote_shares(votes, used).tolist() == [0.75, 0.25, 0.0, 0.0]
    assert vote_shares(np.zeros(4), used).tolist() == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3])


def test_failed_promotion_fails_the_next_forward_and_empties_the_layer() -> None:
    best, rough = expert_blobs(6), expert_blobs(6, 1)
    flaky = Whimsical(HostTier(best), random.Random(0), {2})
    own = mixed(flaky, HostTier(rough), 6, Room(3, 6, 3), eviction=Lru())
    list(own.serve(1, request_for(6, 1, 2)))
    with pytest.raises(CoterieError, match="expert 2 of layer 1 is broken"):
        list(own.serve(1, request_for(6, 1, 2)))
    flaky.broken.clear()
    x = torch.randn(5, HIDDEN)
    routing = Routing(
        torch.tensor([[1, 2]] * 5),
        torch.ones(5, 2),
        request_for(6, 1, 2).used,
        torch.tensor([[1, 2]] * 5),
    )
    everyone = torch.arange(6)
    for who in (set(), {1, 2}):
        true = blended(fp32_slab(best[1], everyone), fp32_slab(rough[1], everyone), who)
        torch.testing.assert_close(
            moe_output(own, 1, routing, x), moe_output(true, 1, routing, x), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("part", ["fine", "coarse"])
def test_what_fails_or_is_left_in_the_middle_leaves_no_wrong_weights(part: str) -> None:
    """Every third forward fails or is broken off; the others are as their placement says."""
    best, rough = expert_blobs(9), expert_blobs(9, 1)
    flaky = {
        name: Whimsical(HostTier(held), random.Random(0))
        for name, held in (("fine", best), ("coarse", rough))
    }
    own = mixed(flaky["fine"], flaky["coarse"], 9, Room(3, 4, 2), eviction=ByVotes(DECAY))
    everyone, failed = torch.arange(9), 0
    for place, routing in enumerate(random_routings(9, 2, count=15, tokens=2)):
        if place % 3 == 1:
            flaky[part].broken.update(range(9))
            try:
                list(own.serve(1, ExpertRequest(routing.used)))
                own.high.ready_cache(1)  # the upgrades that began
            except CoterieError:
                failed += 1
            flaky[part].broken.clear()
        elif place % 3 == 2:
            next(own.serve(1, ExpertRequest(routing.used)))
        else:
            who = set(np.flatnonzero(own.high.layer_cache(1).slots.resident).tolist())
            x = torch.randn(2, HIDDEN)
            true = blended(fp32_slab(best[1], everyone), fp32_slab(rough[1], everyone), who)
            torch.testing.assert_close(
                moe_output(own, 1, routing, x),
                moe_output(true, 1, routing, x),
                atol=1e-5,
                rtol=1e-5,
            )
    assert failed > 2


def test_promotion_that_cannot_start_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The book has given out places by then."""
    best, rough, begun, left = (
        expert_blobs(6),
        expert_blobs(6, 1),
        ThreadedFetcher.fetch_async,
        [None, None],
    )

    def bring(self: ThreadedFetcher, layer: int, expert: int, into: Tensor):
        if self is own.high.fetcher and left and left.pop() is None and not left:
            raise RuntimeError("can't start new thread")
        return begun(self, layer, expert, into)

    own = mixed(HostTier(best), HostTier(rough), 6, Room(3, 6, 3), eviction=Lru())
    monkeypatch.setattr(ThreadedFetcher, "fetch_async", bring)
    with pytest.raises(RuntimeError, match="new thread"):
        list(own.serve(1, request_for(6, 0, 1, 2)))
    ids = torch.tensor([[0, 1, 2]] * 5)
    routing = Routing(ids, torch.ones(5, 3), request_for(6, 0, 1, 2).used, ids)
    x, everyone = torch.randn(5, HIDDEN), torch.arange(6)
    true = blended(fp32_slab(best[1], everyone), fp32_slab(rough[1], everyone), set())
    torch.testing.assert_close(
        moe_output(own, 1, routing, x), moe_output(true, 1, routing, x), atol=1e-5, rtol=1e-5
    )


def test_unreadable_warm_start_promotion_fails_once() -> None:
    flaky = Whimsical(HostTier(expert_blobs(6)), random.Random(0), {1})
    own = mixed(
        flaky,
        HostTier(expert_blobs(6, 1)),
        6,
        Room(2, 3, 0),
        warm={1: np.array([0.0, 3.0, 1.0, 2.0, 0.0, 0.0])},
    )
    with pytest.raises(CoterieError, match="expert 1 of layer 1 is broken"):
        own.fill([1])
    for _ in range(2):
        list(own.serve(1, request_for(6, 0, 1)))
    flaky.broken.clear()
    own.reset()
    assert np.flatnonzero(own.high.layer_cache(1).slots.resident).tolist() == [1, 3]


def test_what_fills_the_memory_is_in_no_forward_and_nothing_that_came_is_lost() -> None:
    votes = np.array([0.0, 3.0, 1.0, 2.0, 0.0, 0.0])
    own = mixed(
        HostTier(expert_blobs(6)), HostTier(expert_blobs(6, 1)), 6, Room(2, 3, 1), warm={1: votes}
    )
    own.fill([1])
    assert experts_moved(own) == {"host, high": 2}
    own.traffic_log.begin_forward("decode")
    list(own.serve(1, request_for(6, 1, 3)))
    own.traffic_log.end_forward()
    list(own.serve(1, request_for(6, 0)))  # comes coarse, and begins to come fine
    own.reset()
    upgraded = own.precision_stats.promotions
    assert experts_moved(own) == {"host, high": 2 + upgraded + 2, "host, low": 1}
    first, *_ = own.traffic_log.forwards
    assert first.traffic.experts_moved == 0


def test_reset_restores_the_initial_state() -> None:
    votes = np.array([0.0, 3.0, 1.0, 2.0, 0.0, 0.0])
    best, rough = HostTier(expert_blobs(6)), HostTier(expert_blobs(6, 1))
    own, new = (mixed(best, rough, 6, Room(2, 3, 2), warm={1: votes}) for _ in range(2))
    before = [ExpertRequest(r.used) for r in random_routings(6, 5, count=5)]
    for demand in before:
        list(own.serve(1, demand))
    own.reset()
    x = torch.randn(5, HIDDEN)
    for routing in random_routings(6, 7, count=5):
        assert torch.equal(moe_output(own, 1, routing, x), moe_output(new, 1, routing, x))
    assert own.traffic_log.traffic().experts_used == new.traffic_log.traffic().experts_used + sum(
        int(demand.used.sum()) for demand in before
    )


def test_experts_in_either_precision_are_resident() -> None:
    own = mixed(HostTier(expert_blobs(6)), HostTier(expert_blobs(6)), 6, Room(1, 2, 1))
    for _ in range(2):
        list(own.serve(1, request_for(6, 4)))
    list(own.serve(1, request_for(6, 2, 5)))
    here = own.resident(1)
    assert here is not None
    assert here.tolist() == [False, False, True, False, True, True]
    assert own.capacity == 3
