"""A whole model that routes as a trace did: it moves what the trace's replay says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from offload_cases import load_engine, needs_kernels, packed_checkpoint
from test_observation import tiny

from coterie.errors import CoterieError
from coterie.lab.replay.cache_simulation import (
    CacheConfig,
    ReplayPolicy,
    TraceVotes,
    depends_on_residents,
    replay_cache,
    select_experts,
)
from coterie.lab.replay.following import TraceDrivenModel, add_commits, drive_with_trace, run_trace
from coterie.lab.replay.synthetic import RoutingLaw, SyntheticShape, synthetic_trace
from coterie.lab.replay.trace import Trace
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.offload.eviction import Lru
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.simulated_store import SimulatedCacheStore
from coterie.routing import Vanilla, parse_policy, route
from coterie.values import ExpertStore, Scores

SHAPE = SyntheticShape(layers=2, experts=16, k=4, tokens=8, steps=4)
LAW = RoutingLaw(expert_variance=0.2, block_variance=0.3, step_correlation=0.9)
PREFERRING = "resident-vote:beta=0.4,resident_bonus=8,max_vote_loss=0.3"
POLICIES = ("vanilla", "des-vote:beta=0.4", PREFERRING)


@cache
def drawn() -> Trace:
    return add_commits(synthetic_trace(SHAPE, LAW, blocks=3, seed=4))


def play(policy: str, commits: bool = True, drift: float | None = None) -> ReplayPolicy:
    return ReplayPolicy(parse_policy(policy), drift, commits)


def store_of(model: Model) -> ExpertStore:
    layer = model.transformer.layers[1].feed_forward
    assert isinstance(layer, MoE)
    return layer.store


def test_blocks_but_the_last_are_committed_as_their_last_forward_was() -> None:
    kinds = [forward.kind for forward in drawn().forwards]
    assert kinds == [*(["decode"] * 4 + ["commit"]) * 2, *["decode"] * 4]
    assert [forward.number for forward in drawn().forwards] == list(range(14))
    np.testing.assert_array_equal(drawn().forwards[4].vanilla_ids, drawn().forwards[3].vanilla_ids)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize(
    ("policy", "drift"),
    [(policy, None) for policy in POLICIES] + [(policy, 0.1) for policy in POLICIES[1:]],
)
def test_a_model_that_follows_a_trace_moves_what_its_replay_says(
    policy: str, drift: float | None, commits: bool
) -> None:
    """Of every forward and all its layers; the store keeps all, and book of five slots."""
    memory, asked = TraceVotes.of(drawn()), play(policy, commits, drift)
    chosen = None if depends_on_residents(asked) else select_experts(memory, asked)
    foretold = replay_cache(memory, asked, chosen, CacheConfig(Lru(), 5))
    store = SimulatedCacheStore(store_of(tiny()), SHAPE.experts, 5)
    ran = run_trace(tiny(), TraceDrivenModel(drawn()), asked, store)
    assert (ran.tokens, ran.decode_forwards, len(ran.seconds)) == (23, 12, 14)
    # A token may find none of a coreset's better than the others, and leave one of it unused.
    assert store.traffic_log.traffic().experts_used <= foretold.used.sum()
    assert store.traffic_log.traffic().experts_used == pytest.approx(foretold.used.sum(), rel=0.02)
    assert store.traffic_log.traffic().experts_moved == pytest.approx(foretold.loads.sum(), rel=0.05)
    if policy == "vanilla":
        assert (store.traffic_log.traffic().experts_used, store.traffic_log.traffic().experts_moved) == (
            foretold.used.sum(),
            foretold.loads.sum(),
        )


@needs_kernels
def test_experts_of_a_disk_are_counted_forward_by_forward(tmp_path: Path) -> None:
    model = load_engine(packed_checkpoint(tmp_path), "5").model
    assert model.store.traffic_log is not None
    memory, asked = TraceVotes.of(drawn()), play("vanilla")
    foretold = replay_cache(memory, asked, select_experts(memory, asked), CacheConfig(Lru(), 5))
    ran = run_trace(model, TraceDrivenModel(drawn()), asked, model.store)
    np.testing.assert_array_equal(ran.used, foretold.used.sum(-1))
    np.testing.assert_array_equal(ran.loads, foretold.loads.sum(-1))
    assert bool((ran.seconds > ran.stalls).all())
    assert ran.tokens_per_second == 23 / ran.seconds.sum()


def test_a_gate_is_computed_and_not_heard() -> None:
    """Own experts are the trace's, in its order, whatever the model's gates think."""
    followed = TraceDrivenModel(drawn())
    model = drive_with_trace(tiny(), followed, store_of(tiny()))
    layer = model.transformer.layers[2].feed_forward
    assert isinstance(layer, MoE)
    assert layer.score_override is not None
    followed.index = 3
    told = layer.score_override(Scores(torch.zeros(1, 8, 16), model.spec.router, moe_index=1))
    seen = route(told, Vanilla())
    np.testing.assert_array_equal(seen.vanilla_ids.numpy(), drawn().forwards[3].vanilla_ids[1])


def test_what_cannot_be_followed_is_said() -> None:
    with pytest.raises(CoterieError, match="has a bias"):
        TraceDrivenModel(replace(drawn(), bias=np.zeros((2, 16), np.float32)))
    alone = replace(drawn(), forwards=drawn().forwards[:4])
    uneven = replace(drawn(), forwards=drawn().forwards[:12])
    nothing = ResidentExpertStore({})
    with pytest.raises(CoterieError, match="as many forwards"):
        run_trace(tiny(), TraceDrivenModel(uneven), play("vanilla"), nothing)
    other = synthetic_trace(replace(SHAPE, experts=24), LAW, blocks=1)
    with pytest.raises(CoterieError, match="other layers or experts"):
        run_trace(tiny(), TraceDrivenModel(other), play("vanilla"), nothing)
    without = synthetic_trace(SHAPE, LAW, blocks=2)
    with pytest.raises(CoterieError, match="goes on with a commit where the trace has a decode"):
        run_trace(tiny(), TraceDrivenModel(without), play("vanilla"), store_of(tiny()))
    assert run_trace(tiny(), TraceDrivenModel(alone), play("vanilla"), store_of(tiny())).tokens == 7
