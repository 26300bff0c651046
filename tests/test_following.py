"""A whole model that routes as a trace did: it moves what the trace's replay says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_offload import needs_kernels, opened, packed
from test_watch import tiny

from coterie.engine.load import Model
from coterie.experts.eviction import Lru
from coterie.experts.imagined import Imagined
from coterie.experts.store import Resident
from coterie.model.moe import MoE
from coterie.naming import CoterieError
from coterie.planning.booking import Cache, Memory, Play, asks_residents, book, choose
from coterie.planning.following import Following, following, run, with_commits
from coterie.planning.synthetic import Law, Shape, synthetic
from coterie.planning.trace import Trace
from coterie.routing import Vanilla, parse_policy, route
from coterie.values import Scores, Store

SHAPE = Shape(layers=2, experts=16, k=4, tokens=8, steps=4)
LAW = Law(always=0.2, block=0.3, steady=0.9)
PREFERRING = "resident-vote:beta=0.4,resident_bonus=8,max_vote_loss=0.3"
POLICIES = ("vanilla", "des-vote:beta=0.4", PREFERRING)


@cache
def drawn() -> Trace:
    return with_commits(synthetic(SHAPE, LAW, blocks=3, seed=4))


def play(policy: str, commits: bool = True, drift: float | None = None) -> Play:
    return Play(parse_policy(policy), drift, commits)


def store_of(model: Model) -> Store:
    layer = model.transformer.layers[1].feed_forward
    assert isinstance(layer, MoE)
    return layer.store


def test_blocks_but_the_last_are_committed_as_their_last_forward_was() -> None:
    kinds = [forward.kind for forward in drawn().forwards]
    assert kinds == [*(["decode"] * 4 + ["commit"]) * 2, *["decode"] * 4]
    assert [forward.number for forward in drawn().forwards] == list(range(14))
    np.testing.assert_array_equal(drawn().forwards[4].ids, drawn().forwards[3].ids)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize(
    ("policy", "drift"),
    [(policy, None) for policy in POLICIES] + [(policy, 0.1) for policy in POLICIES[1:]],
)
def test_a_model_that_follows_a_trace_moves_what_its_replay_says(
    policy: str, drift: float | None, commits: bool
) -> None:
    """Of every forward and all its layers; the store keeps all, and book of five slots."""
    memory, asked = Memory.of(drawn()), play(policy, commits, drift)
    chosen = None if asks_residents(asked) else choose(memory, asked)
    foretold = book(memory, asked, chosen, Cache(Lru(), 5))
    store = Imagined(store_of(tiny()), SHAPE.experts, 5)
    ran = run(tiny(), Following(drawn()), asked, store)
    assert (ran.tokens, ran.decoding, len(ran.seconds)) == (23, 12, 14)
    # A token may find none of a coreset's better than the others, and leave one of it unused.
    assert store.used <= foretold.used.sum()
    assert store.used == pytest.approx(foretold.used.sum(), rel=0.02)
    assert store.moved == pytest.approx(foretold.loads.sum(), rel=0.05)
    if policy == "vanilla":
        assert (store.used, store.moved) == (foretold.used.sum(), foretold.loads.sum())


@needs_kernels
def test_experts_of_a_disk_are_counted_forward_by_forward(tmp_path: Path) -> None:
    model = opened(packed(tmp_path), "5").model
    assert model.offloaded is not None
    memory, asked = Memory.of(drawn()), play("vanilla")
    foretold = book(memory, asked, choose(memory, asked), Cache(Lru(), 5))
    ran = run(model, Following(drawn()), asked, model.offloaded)
    np.testing.assert_array_equal(ran.used, foretold.used.sum(-1))
    np.testing.assert_array_equal(ran.loads, foretold.loads.sum(-1))
    assert bool((ran.seconds > ran.stalls).all())
    assert ran.tokens_per_second == 23 / ran.seconds.sum()


def test_a_gate_is_computed_and_not_heard() -> None:
    """Own experts are the trace's, in its order, whatever the model's gates think."""
    followed = Following(drawn())
    model = following(tiny(), followed, store_of(tiny()))
    layer = model.transformer.layers[2].feed_forward
    assert isinstance(layer, MoE)
    assert layer.told is not None
    followed.place = 3
    told = layer.told(Scores(torch.zeros(1, 8, 16), model.spec.router, ordinal=1))
    seen = route(told, Vanilla())
    np.testing.assert_array_equal(seen.own.numpy(), drawn().forwards[3].ids[1])


def test_what_cannot_be_followed_is_said() -> None:
    with pytest.raises(CoterieError, match="has a bias"):
        Following(replace(drawn(), bias=np.zeros((2, 16), np.float32)))
    alone = replace(drawn(), forwards=drawn().forwards[:4])
    uneven = replace(drawn(), forwards=drawn().forwards[:12])
    nothing = Resident({})
    with pytest.raises(CoterieError, match="as many forwards"):
        run(tiny(), Following(uneven), play("vanilla"), nothing)
    other = synthetic(replace(SHAPE, experts=24), LAW, blocks=1)
    with pytest.raises(CoterieError, match="other layers or experts"):
        run(tiny(), Following(other), play("vanilla"), nothing)
    without = synthetic(SHAPE, LAW, blocks=2)
    with pytest.raises(CoterieError, match="goes on with a commit where the trace has a decode"):
        run(tiny(), Following(without), play("vanilla"), store_of(tiny()))
    assert run(tiny(), Following(alone), play("vanilla"), store_of(tiny())).tokens == 7
