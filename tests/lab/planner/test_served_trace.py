"""Traces served by a real store: it moves what their replay says, and routes what was elected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import HIDDEN, SIZE, fp32_slab
from policy_strategies import law
from torch import Tensor

from coterie.errors import CoterieError
from coterie.lab.planner.served_trace import routing_from_trace, serve_trace
from coterie.lab.planner.synthetic_trace import RoutingLaw, SyntheticShape, synthetic_trace
from coterie.lab.replay.cache_simulation import (
    CacheConfig,
    ReplayPolicy,
    TraceVotes,
    replay_cache,
    select_experts,
)
from coterie.lab.replay.trace import Trace
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.eviction import Eviction, Lfu, Lru
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.tiers import HostTier
from coterie.routing import parse_policy
from coterie.values import expert_mask

SHAPE = SyntheticShape(layers=2, experts=24, k=3, tokens=6, steps=4)
LAW = RoutingLaw(expert_variance=0.2, block_variance=0.3, step_correlation=0.9)
PLAYS = (
    *(ReplayPolicy(parse_policy(text)) for text in ("vanilla", "des-vote:beta=0.3", "des-seq:k=1")),
    ReplayPolicy(parse_policy("des-vote:beta=0.3"), reuse_tolerance=0.2),
    ReplayPolicy(parse_policy("resident-vote:beta=0.3,resident_bonus=8,max_vote_loss=0.5")),
    ReplayPolicy(
        parse_policy("resident-vote:beta=0.3,resident_bonus=8,max_vote_loss=0.5"),
        reuse_tolerance=0.2,
    ),
)


def drawn(seed: int) -> Trace:
    return synthetic_trace(SHAPE, LAW, blocks=2, seed=seed)


def blobs(trace: Trace) -> dict[int, Tensor]:
    return {
        layer: torch.randn(SHAPE.experts, SIZE // 4).view(torch.uint8)
        for layer in trace.header.layers
    }


def store(trace: Trace, capacity: int, rule: Eviction) -> CachedExpertStore:
    def allocate(slots: int, size: int) -> Tensor:
        return torch.zeros(slots, size, dtype=torch.uint8)

    courier = ThreadedFetcher(HostTier(blobs(trace)))
    return CachedExpertStore(courier, fp32_slab, allocate, SHAPE.experts, SIZE, capacity, rule)


@given(
    st.sampled_from(PLAYS),
    st.integers(1, 26),
    st.integers(0, 2**10),
    st.sampled_from((Lru(), Lfu())),
)
@law(30)
def test_a_store_moves_what_its_replay_says(
    play: ReplayPolicy, capacity: int, seed: int, rule: Eviction
) -> None:
    trace = drawn(seed)
    memory = TraceVotes.of(trace)
    chosen = None if play.depends_on_residents else select_experts(memory, play)
    foretold = replay_cache(memory, play, chosen, CacheConfig(rule, min(capacity, SHAPE.experts)))
    served = serve_trace(trace, play, store(trace, capacity, rule), torch.randn(6, HIDDEN))
    np.testing.assert_array_equal(served.used, foretold.used)
    np.testing.assert_array_equal(served.loads, foretold.loads)
    assert bool((served.seconds > 0).all())


def test_a_store_that_holds_all_moves_nothing() -> None:
    trace = drawn(1)
    everyone = torch.arange(SHAPE.experts)
    resident = ResidentExpertStore(
        {layer: fp32_slab(one, everyone) for layer, one in blobs(trace).items()}
    )
    served = serve_trace(trace, PLAYS[0], resident, torch.randn(6, HIDDEN))
    assert (served.loads.sum(), served.stall_seconds) == (0, 0.0)
    own = np.stack([forward.vanilla_mask.sum(-1) for forward in trace.forwards])
    np.testing.assert_array_equal(served.used, own)


@given(st.integers(1, 24), st.integers(0, 2**10))
@law(30)
def test_tokens_keep_their_own_experts_and_take_no_others_than_the_coreset(
    size: int, seed: int
) -> None:
    forward = drawn(seed).forwards[0]
    rng = np.random.default_rng(seed)
    coreset = np.zeros(SHAPE.experts, dtype=bool)
    coreset[rng.permutation(SHAPE.experts)[:size]] = True
    found = routing_from_trace(forward, 1, coreset, torch.Generator().manual_seed(seed))
    taken = expert_mask(found.topk_ids, SHAPE.experts).numpy()
    own = expert_mask(found.vanilla_ids, SHAPE.experts).numpy()
    assert not (taken & ~coreset).any()
    assert not (own & coreset & ~taken).any()
    assert (taken.sum(-1) == min(size, SHAPE.k)).all()
    assert ((found.topk_ids < 0) == (found.topk_weights == 0)).all()


def test_what_cannot_be_served_is_said() -> None:
    trace = drawn(2)
    with pytest.raises(CoterieError, match=r"forwards of \[6\] tokens cannot compute 5"):
        serve_trace(trace, PLAYS[0], store(trace, 4, Lru()), torch.randn(5, HIDDEN))
    shared = replace(trace, forwards=tuple(replace(one, number=0) for one in trace.forwards))
    with pytest.raises(CoterieError, match="share forwards"):
        serve_trace(shared, PLAYS[0], store(trace, 4, Lru()), torch.randn(6, HIDDEN))
