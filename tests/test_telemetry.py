"""Recorders count the experts that are routed, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coterie.routing import parse_policy, route
from coterie.telemetry import ExpertCounter, Recorder, TensorRecorder, routing_stats
from coterie.values import ExpertRequest, RouterSpec, Scores

ROUTER = RouterSpec(experts=16, k=4, activation="sigmoid", renormalise=True)


def scores(rows: int, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores(torch.randn(rows, 6, 16, generator=generator), ROUTER)


def count_experts(
    policy: str, *forwards: Scores, layers: tuple[int, ...] = (1, 2)
) -> ExpertCounter:
    counter = ExpertCounter()
    for seen in forwards:
        counter.on_forward(tuple("abc"[: len(seen.logits)]))
        for layer in layers:
            counter.on_routed(layer, seen, route(seen, parse_policy(policy)))
    return counter


def test_vanilla_keeps_everything():
    counts = count_experts("vanilla", scores(1), scores(1, seed=1)).counts("a")
    assert (counts.forwards, counts.layers) == (2, (1, 2))
    assert (counts.vote_mass_kept, counts.hit_rate) == (1.0, 1.0)
    assert counts.per_layer == counts.vanilla_per_layer
    assert counts.mean == counts.vanilla_mean


def test_unique_experts_are_those_of_the_routing():
    first, second = scores(1), scores(1, seed=1)
    counts = count_experts("des-vote:beta=0.3,protect=top1", first, second, layers=(3,)).counts("a")
    policy = parse_policy("des-vote:beta=0.3,protect=top1")
    unique = [len(route(seen, policy).topk_ids.unique()) for seen in (first, second)]
    assert counts.per_layer == (sum(unique) / 2,)
    assert counts.mean == sum(unique) / 2
    assert counts.max == max(unique)


def test_vote_mass_and_hit_rate_by_hand():
    seen = scores(1)
    policy = parse_policy("des-vote:beta=0.25")
    counts = count_experts("des-vote:beta=0.25", seen).counts("a")
    coreset = policy.eligible(seen, 4)[0, 0]
    routing = route(seen, policy)
    p = seen.logits.sigmoid()[0]
    votes = (
        torch.zeros(6, 16).scatter(1, routing.vanilla_ids, p.gather(1, routing.vanilla_ids)).sum(0)
    )
    assert counts.vote_mass_kept == pytest.approx(float(votes[coreset].sum() / votes.sum()))
    hits = [set(vanilla) & set(ids) for vanilla, ids in _pairs(routing)]
    assert counts.hit_rate == pytest.approx(sum(map(len, hits)) / 24)


def test_a_row_of_a_batch_counts_as_it_does_alone():
    together = scores(3)
    batch = count_experts("mass-vote:tau=0.5", together)
    for row, name in enumerate("abc"):
        alone = count_experts(
            "mass-vote:tau=0.5", replace(together, logits=together.logits[row, None])
        )
        assert batch.counts(name) == alone.counts("a")


def test_layers_counted_in_a_batch_count_as_they_do_alone():
    """Also if one layer of the forward has another number of experts."""
    voters = torch.tensor([[1.0, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    first, second = replace(scores(2), voters=voters), replace(scores(2, seed=1), voters=voters)
    wide = Scores(second.logits[..., :8], replace(ROUTER, experts=8), voters=voters)
    policy = parse_policy("des-vote:beta=0.25")
    counter = ExpertCounter()
    counter.on_forward(("a", "b"))
    alone = []
    for layer, seen in enumerate((first, second, wide)):
        routing = route(seen, policy)
        counter.on_routed(layer, seen, routing)
        alone.append(routing_stats(seen, routing))
    for row, name in enumerate("ab"):
        counts, each = counter.counts(name), torch.stack(alone)[:, row]
        assert counts.per_layer == tuple(each[:, 0].tolist())
        assert counts.vanilla_per_layer == tuple(each[:, 1].tolist())
        assert counts.vote_mass_kept == pytest.approx(float(each[:, 2].sum() / each[:, 3].sum()))
        assert counts.hit_rate == float(each[:, 4].sum() / each[:, 5].sum())


def test_layers_are_counted_when_the_next_forward_starts():
    """Pending layers are those of one forward."""
    counter = count_experts(
        "vanilla", *(scores(1, seed=seed) for seed in range(5)), layers=(1, 2, 3)
    )
    assert len(counter._pending) == 3
    assert counter.counts("a").forwards == 5
    assert len(counter._pending) == 0


def test_a_row_that_joins_later_has_fewer_forwards():
    counter = count_experts("vanilla", scores(1), scores(3, seed=1))
    assert [counter.counts(row).forwards for row in "abcz"] == [2, 1, 1, 0]


def test_positions_without_a_vote_count_only_as_used_experts():
    seen = scores(1)
    voters = torch.tensor([[1, 1, 1, 0, 0, 0]])
    block = count_experts("des-vote:beta=0.25", replace(seen, logits=seen.logits[:, :3])).counts(
        "a"
    )
    window = count_experts("des-vote:beta=0.25", replace(seen, voters=voters)).counts("a")
    assert window.vote_mass_kept == block.vote_mass_kept
    assert window.hit_rate == block.hit_rate
    assert window.vanilla_mean > block.vanilla_mean


def test_the_latest_forward_can_be_count_experts():
    counter = count_experts("vanilla", scores(2), scores(2, seed=1))
    last = route(scores(2, seed=1), parse_policy("vanilla")).topk_ids.view(2, -1)
    assert counter.latest_counts("b").per_layer == (len(last[1].unique()),) * 2
    assert ExpertCounter().latest_counts().per_layer == ()


def test_an_empty_counter_has_zero_counts():
    counts = ExpertCounter().counts()
    assert (counts.forwards, counts.mean, counts.max, counts.per_layer) == (0, 0.0, 0, ())


def test_dropping_a_row_keeps_other_rows():
    counter = count_experts("vanilla", scores(3))
    before = counter.counts("b")
    counter.drop_row("a")
    counter.drop_row("unknown")
    assert counter.counts("a").forwards == 0
    assert counter.counts("b") == before


def test_a_tensor_recorder_keeps_its_tensors():
    tensor_recorder, seen = TensorRecorder(), scores(1)
    routing = route(seen, parse_policy("vanilla"))
    recorders: list[Recorder] = [tensor_recorder, Recorder(), ExpertCounter()]
    for recorder in recorders:
        recorder.on_forward(("a",))
        recorder.on_routed(2, seen, routing)
        recorder.on_layer_output(2, seen.logits)
    assert tensor_recorder.rows == [("a",)]
    assert tensor_recorder.routings == [(2, seen, routing)]
    assert tensor_recorder.outputs[0][0] == 2
    assert torch.equal(tensor_recorder.outputs[0][1], seen.logits)


def _pairs(routing):
    return zip(routing.vanilla_ids.tolist(), routing.topk_ids.tolist(), strict=True)


@pytest.mark.parametrize("voters", [None, [[1.0, 0, 0.5, 1, 0, 0], [0, 0, 0, 0, 0, 0]]])
def test_token_counts_and_votes_of_a_request_by_hand(voters: list[list[float]] | None):
    """The second row has no voter: all of its tokens vote."""
    seen = replace(scores(2), voters=None if voters is None else torch.tensor(voters))
    routing = route(seen, parse_policy("des-vote:beta=0.25"))
    request = ExpertRequest(routing.used, routing, seen)
    tokens, votes = [0] * 16, [0.0] * 16
    vanilla_ids, weights = routing.vanilla_ids.view(2, 6, 4), voters or [[1.0] * 6] * 2
    for row in range(2):
        for token in range(6):
            weight = weights[row][token] if any(weights[row]) else 1.0
            for expert in vanilla_ids[row, token].tolist():
                votes[expert] += weight * float(seen.logits[row, token, expert].sigmoid())
    for expert in routing.topk_ids[routing.topk_ids >= 0].tolist():
        tokens[expert] += 1
    assert request.token_counts is not None
    assert request.votes is not None
    assert request.token_counts.tolist() == tokens
    assert request.votes.tolist() == pytest.approx(votes)
    assert (
        ExpertRequest(routing.used).token_counts,
        ExpertRequest(routing.used, routing).votes,
    ) == (None, None)
