"""Recorded votes are those of the election, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import LAYERS, cached_store, expert_blobs
from score_strategies import blocks

import coterie
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised
from coterie.offload.mixed_precision_store import MixedPrecisionStore
from coterie.offload.tiers import HostTier
from coterie.routing import Election, parse_policy, route
from coterie.routing.coreset import flatten_batch
from coterie.routing.router import VOTE_UNIT
from coterie.routing.votes import VOTES, vote_weights
from coterie.server.votes import StepVotes, VoteRecorder
from coterie.values import RouterSpec, Scores

POLICIES = (
    "vanilla",
    "des-vote:beta=0.3",
    "des-vote:beta=0.3,voters=masked,vote=weight",
    "xshare:beta=0.2",
    "priced-vote:price=0.1",
    "des-vote:beta=0.3,scope=batch",
)

ROUTER = RouterSpec(experts=8, k=2, activation="softmax", renormalise=True)


def recorded(scores: Scores, policy_text: str, *rows: str) -> tuple[VoteRecorder, StepVotes]:
    """A recorder after one forward of two equal layers, and what it says of the last row."""
    policy, recorder = parse_policy(policy_text), VoteRecorder()
    recorder.watch(rows[-1], policy)
    recorder.on_forward(rows)
    for layer in (1, 2):
        recorder.on_routed(layer, scores, route(scores, policy))
    votes = recorder.latest(rows[-1])
    assert votes is not None
    return recorder, votes


@given(scores=blocks(groups=False), policy=st.sampled_from(POLICIES))
def test_votes_are_those_of_the_election(scores: Scores, policy: str) -> None:
    rows = tuple("abc"[: len(scores.logits)])
    _, votes = recorded(scores, policy, *rows)
    election = getattr(parse_policy(policy), "election", Election())
    batch = flatten_batch(scores) if election.scope == "batch" else scores
    counted = VOTES[election.vote](batch, vote_weights(batch, election.voters), election.seed)
    assert votes.layers == (1, 2)
    assert torch.equal(votes.votes[0] * VOTE_UNIT, counted[-1].double())
    assert torch.equal(votes.votes[0], votes.votes[1])


@given(scores=blocks(groups=False, ties=False), beta=st.sampled_from((0.1, 0.3, 0.6)))
def test_no_rejected_expert_has_more_votes_than_an_elected_one(scores: Scores, beta: float) -> None:
    _, votes = recorded(scores, f"des-vote:beta={beta}", *"abc"[: len(scores.logits)])
    rejected = votes.votes.masked_fill(votes.elected, -1).amax(1)
    elected = votes.votes.masked_fill(~votes.elected, torch.inf).amin(1)
    assert (elected >= rejected).all()


@given(scores=blocks(rows=3))
def test_elected_are_the_experts_that_the_row_uses(scores: Scores) -> None:
    _, votes = recorded(scores, "des-vote:beta=0.3", "a", "b", "c")
    routing = route(scores, parse_policy("des-vote:beta=0.3"))
    ids = routing.topk_ids.view(3, -1)[2]
    assert votes.elected[0].nonzero().flatten().tolist() == ids[ids >= 0].unique().tolist()
    assert votes.resident is not None
    assert torch.equal(votes.resident[0], scores.resident)


def test_only_watched_rows_are_kept() -> None:
    scores = Scores(torch.randn(2, 4, 8), ROUTER)
    recorder, _ = recorded(scores, "vanilla", "a", "b")
    assert recorder.latest("a") is None
    recorder.unwatch("b")
    assert recorder.is_idle
    assert recorder.latest("b") is None


def test_a_store_with_two_precisions_shows_which_experts_have_the_high_one() -> None:
    warm = {layer: np.arange(8.0) for layer in LAYERS}
    high = cached_store(HostTier(expert_blobs(8)), 8, 3, warm_votes=warm)
    low = cached_store(HostTier(expert_blobs(8)), 8, 2)
    scores, policy = Scores(torch.randn(1, 4, 8), ROUTER), parse_policy("vanilla")
    recorder = VoteRecorder(MixedPrecisionStore(high, low))
    recorder.watch("a", policy)
    recorder.on_forward(("a",))
    for layer in LAYERS:
        recorder.on_routed(layer, scores, route(scores, policy))
    votes = recorder.latest("a")
    assert votes is not None
    assert votes.resident is None
    assert votes.high is not None
    assert votes.high.tolist() == [[False] * 5 + [True] * 3] * 2


@pytest.mark.usefixtures("embedded_once")
def test_watching_does_not_change_the_answer() -> None:
    engine = coterie.load()
    prompts, policy = ["What is 3 + 4?", "Solve 3x = 9 for x."], "des-vote:beta=0.3"
    alone = [engine.generate(prompt, policy=policy).text for prompt in prompts]
    recorder = VoteRecorder.of(engine.model)
    engine.set_recorder(recorder)
    rows = [engine.submit(prompt, policy=policy) for prompt in prompts]
    for row in rows:
        recorder.watch(row, parse_policy(policy))
    texts = dict.fromkeys(rows, "")
    while engine.rows:
        for event in engine.step():
            if isinstance(event, Denoised):
                texts[event.row] += event.text
                check_step(engine, event, recorder.latest(event.row))
    assert list(texts.values()) == alone


def check_step(engine: Engine, event: Denoised, votes: StepVotes | None) -> None:
    """The recorded election has as many experts as the event says, and keeps as many votes."""
    assert votes is not None
    assert votes.layers == engine.model.spec.moe_layers
    assert tuple(votes.elected.sum(1).tolist()) == event.experts
    kept = (votes.votes * votes.elected).sum() / votes.votes.sum()
    assert float(kept) == pytest.approx(event.vote_mass_kept, rel=1e-6)
