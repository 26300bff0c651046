"""Each policy on scores small enough to check by hand, and against a plain implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie.errors import CoterieError
from coterie.routing import McMoe, Vanilla, needs_importance, parse_policy, route
from coterie.routing.coreset import Fixed, Mass, rank_by_votes, restore_votes, take_first
from coterie.values import DecodeProgress, Policy, RouterSpec, Scores

SIGMOID = RouterSpec(experts=6, k=2, activation="sigmoid", renormalise=True)


def logits(*rows: tuple[float, ...]) -> Tensor:
    """[1, N, E] whose sigmoid is ``rows``."""
    return torch.logit(torch.tensor([rows], dtype=torch.float64)).float()


BLOCK = logits(
    (0.9, 0.8, 0.1, 0.1, 0.1, 0.1),
    (0.1, 0.3, 0.2, 0.1, 0.1, 0.1),
    (0.1, 0.1, 0.1, 0.6, 0.5, 0.4),
)


def coreset_of(text: str, scores: Scores) -> list[int]:
    mask = parse_policy(text).eligible(scores, scores.router.k)
    assert mask.shape[1] == 1
    return mask[0, 0].nonzero().flatten().tolist()


def ids_of(policy: Policy | str, scores: Scores) -> list[list[int]]:
    policy = parse_policy(policy) if isinstance(policy, str) else policy
    return route(scores, policy).topk_ids.tolist()


@pytest.mark.parametrize(
    ("text", "elected"),
    [
        ("coreset:m=1", [1]),  # own votes .9, 1.1, .2, .6, .5, 0
        ("coreset:m=3", [0, 1, 3]),
        ("coreset:m=6", [0, 1, 2, 3, 4, 5]),
        ("coreset:m=99", [0, 1, 2, 3, 4, 5]),
        (f"coreset:m={10**30}", [0, 1, 2, 3, 4, 5]),
        (f"mass-vote:tau=0.5,least={10**30}", [0, 1, 2, 3, 4, 5]),
        ("coreset:m=1,vote=count", [1]),
        ("coreset:m=2,vote=count", [0, 1]),  # 0, 2, 3, 4 have one vote each: the lowest
        ("coreset:m=3,vote=weight", [1, 3, 0]),  # .53, 1.07, .4, .55, .45
        ("coreset:m=5,vote=full", [0, 1, 3, 4, 5]),  # 5 has .6 of all scores, 2 has .4
        ("coreset:m=2,vote=max", [0, 1]),
        ("coreset:m=1,protect=top1", [0, 1, 3]),  # the protected alone exceed the budget
        ("coreset:m=4,protect=top1", [0, 1, 3, 4]),
        ("des-seq:k=1", [0, 1, 3]),
        ("des-vote:beta=0.5", [0, 1, 3]),
        ("uniform-vote:beta=0.34", [0, 1]),
        ("xshare:beta=0.2", [0, 1, 3]),
        ("racing:m=1", [0]),
        ("mass-vote:tau=0.6", [0, 1]),  # 2.0 of 3.3
        ("mass-vote:tau=0.61", [0, 1, 3]),
        ("mass-vote:tau=0.1", [0, 1]),  # at least k
        ("mass-vote:tau=0.1,least=1", [1]),
        ("mass-vote:tau=1", [0, 1, 2, 3, 4]),
    ],
)
def test_policies_elect_the_expected_experts(text: str, elected: list[int]):
    assert coreset_of(text, Scores(BLOCK, SIGMOID)) == sorted(elected)


def test_the_bias_selects_and_does_not_weigh():
    bias = torch.tensor([0.0, 0, 0, 0, 0, 1])
    routing = route(Scores(BLOCK, SIGMOID, bias=bias), Vanilla())
    assert routing.topk_ids.tolist() == [[5, 0], [5, 1], [5, 3]]
    torch.testing.assert_close(routing.topk_weights[0], torch.tensor([0.1, 0.9]))


def test_racing_votes_with_the_bias_and_des_vote_without():
    bias = torch.tensor([0.0, 0, 0, 0.35, 0, 0])
    assert coreset_of("racing:m=1", Scores(BLOCK, SIGMOID, bias=bias)) == [3]
    assert coreset_of("coreset:m=1", Scores(BLOCK, SIGMOID, bias=bias)) == [1]


def test_a_token_also_uses_coreset_experts_outside_its_top_k():
    routing = route(Scores(BLOCK, replace(SIGMOID, scale=2.5)), parse_policy("coreset:m=2"))
    assert routing.topk_ids.tolist() == [[0, 1], [1, 0], [0, 1]]
    torch.testing.assert_close(routing.topk_weights[2], torch.tensor([1.25, 1.25]))
    assert routing.vanilla_ids.tolist() == [[0, 1], [1, 2], [3, 4]]


def test_a_coreset_smaller_than_k_gives_ids_of_minus_one():
    routing = route(Scores(BLOCK, SIGMOID), parse_policy("coreset:m=1"))
    assert routing.topk_ids.tolist() == [[1, -1]] * 3
    assert routing.topk_weights.tolist() == [[1.0, 0.0]] * 3
    assert routing.used.nonzero().flatten().tolist() == [1]


def test_votes_that_round_to_one_number_tie_and_the_lower_expert_wins():
    """Votes are in units of 2**-40: a token's far experts get none, whatever their order is."""
    router = RouterSpec(4, 1, "softmax", renormalise=True)
    scores = Scores(torch.tensor([[[0.0, -31.0, -30.0, -500.0]]]), router)
    assert scores.probability[0, 0, 2] > scores.probability[0, 0, 1] > 0
    policy = parse_policy("coreset:m=2,vote=full")
    assert policy.eligible(scores, 1).tolist() == [[[True, True, False, False]]]


def test_of_equal_votes_the_lower_expert_returns_first_and_leaves_first():
    votes = torch.tensor([[4, 4, 4, 1, 1, 4]])
    plain = torch.tensor([[True, True, True, False, False, False]])
    restored = restore_votes(~plain, plain, votes, 0.25)  # 9 of 12 votes: one swap
    assert restored.tolist() == [[True, False, False, False, True, True]]


def test_ties_go_to_the_lower_expert():
    flat = Scores(torch.zeros(1, 2, 6), SIGMOID)
    assert ids_of("vanilla", flat) == [[0, 1], [0, 1]]
    assert coreset_of("coreset:m=3,vote=full", flat) == [0, 1, 2]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_equal_logits_tie_at_every_position(activation: Literal["softmax", "sigmoid"]):
    for experts in range(2, 80):
        router = RouterSpec(experts, 2, activation, renormalise=False)
        p = Scores(torch.full((1, 3, experts), 0.3), router).probability
        assert p.shape == (1, 3, experts)
        assert len(p.unique()) == 1


def test_groups_are_coreset_before_the_coreset_and_filled_from_outside_them():
    router = RouterSpec(8, 3, "sigmoid", True, groups=4, topk_groups=2)
    scores = Scores(logits((0.9, 0.1, 0.4, 0.5, 0.8, 0.7, 0.3, 0.2)), router)
    # Groups {4, 5} with 1.5 and {0, 1} with 1.0 stay; {2, 3} with 0.9 does not.
    assert ids_of("vanilla", scores) == [[0, 4, 5]]
    assert ids_of(_only(1, 3, 4, 7), scores) == [[4, 1, 3]]
    assert ids_of(_only(2, 7), scores) == [[2, 7, -1]]


def test_topk_keeps_the_first_and_renormalises():
    routing = route(Scores(BLOCK, SIGMOID), parse_policy("topk:k=1"))
    assert routing.topk_ids.tolist() == [[0, -1], [1, -1], [3, -1]]
    assert routing.topk_weights.tolist() == [[1.0, 0.0]] * 3
    assert ids_of("topk:k=7", Scores(BLOCK, SIGMOID)) == ids_of("vanilla", Scores(BLOCK, SIGMOID))


def test_topk_without_renormalising_keeps_the_models_weights():
    router = replace(SIGMOID, renormalise=False)
    weights = route(Scores(BLOCK, router), parse_policy("topk:k=1")).topk_weights
    torch.testing.assert_close(weights, torch.tensor([[0.9, 0], [0.3, 0], [0.6, 0]]))


@pytest.mark.parametrize(
    ("beta", "ids"),
    [
        (0.0, [0, 1, 2, 3]),
        (0.1, [0, 1, 2, 3]),  # .2 is not below .1 * 2.0
        (0.11, [0, 1, 2, -1]),
        (0.3, [0, 1, -1, -1]),  # .3 + .2 < .6
        (0.6, [0, -1, -1, -1]),  # .6 + .3 + .2 < 1.2
        (1.0, [0, -1, -1, -1]),  # never the first
    ],
)
def test_naee_drops_the_tail_below_beta(beta: float, ids: list[int]):
    router = RouterSpec(5, 4, "sigmoid", False)
    scores = Scores(logits((0.9, 0.6, 0.3, 0.2, 0.1)), router)
    assert ids_of(f"naee:beta={beta}", scores) == [ids]


def test_naee_orders_by_probability_and_not_by_bias():
    router = RouterSpec(4, 3, "sigmoid", False)
    bias = torch.tensor([0.0, 0.0, 1.0, 0.0])
    scores = Scores(logits((0.9, 0.6, 0.1, 0.1)), router, bias=bias)
    assert ids_of("vanilla", scores) == [[2, 0, 1]]
    assert ids_of("naee:beta=0.1", scores) == [[0, 1, -1]]


def test_mc_moe_keeps_the_most_important_share_rounded_up():
    importance = torch.tensor([[0.1, 0.2, 0.3]])
    scores = Scores(BLOCK, SIGMOID, importance=importance)
    counts = [
        (route(scores, McMoe(1.0, share)).topk_ids >= 0).sum(-1).tolist()
        for share in (0, 0.02, 0.5, 1)
    ]
    assert counts == [[1, 1, 1], [1, 1, 2], [1, 2, 2], [2, 2, 2]]


def test_only_mc_moe_needs_importance():
    assert needs_importance(parse_policy("mc-moe:beta=0.6"))
    assert not needs_importance(parse_policy("naee:beta=0.6"))
    with pytest.raises(CoterieError, match="mc-moe needs the importance"):
        route(Scores(BLOCK, SIGMOID), parse_policy("mc-moe:beta=0.6"))


def test_experts_of_tokens_without_a_vote_are_not_protected():
    scores = Scores(BLOCK, SIGMOID, voters=torch.tensor([[True, True, False]]))
    assert coreset_of("coreset:m=1,protect=top1", scores) == [0, 1]
    assert coreset_of("des-seq:k=1", scores) == [0, 1]
    assert coreset_of("coreset:m=3", scores) == [0, 1, 2]


@pytest.mark.parametrize(
    ("voters", "elected"), [("before-eos", [0, 1]), ("masked", [3, 4]), ("uncertain", [1, 2])]
)
def test_the_voters_option_narrows_the_voters(voters: str, elected: list[int]):
    progress = DecodeProgress(
        after_eos=torch.tensor([[False, False, True]]),
        masked=torch.tensor([[False, False, True]]),
        uncertainty=torch.tensor([[0.0, 1.0, 0.1]]),
    )
    scores = Scores(BLOCK, SIGMOID, progress=progress)
    assert coreset_of(f"coreset:m=2,voters={voters}", scores) == elected


def test_voters_without_progress_are_an_error():
    with pytest.raises(CoterieError, match=r"voters=masked.*progress"):
        route(Scores(BLOCK, SIGMOID), parse_policy("des-vote:beta=0.5,voters=masked"))


def test_without_a_voter_left_the_voters_of_the_engine_vote():
    progress = DecodeProgress(masked=torch.zeros(1, 3, dtype=torch.bool))
    scores = Scores(BLOCK, SIGMOID, voters=torch.tensor([[0, 0, 1]]), progress=progress)
    assert coreset_of("coreset:m=2,voters=masked", scores) == [3, 4]


def test_a_batch_shares_one_coreset_with_scope_batch_only():
    two = Scores(torch.stack([BLOCK[0, 0], BLOCK[0, 2]]).unsqueeze(1), SIGMOID)
    assert parse_policy("des-seq:k=1").eligible(two, 2).sum(-1).tolist() == [[1], [1]]
    assert coreset_of("des-seq:k=1,scope=batch", two) == [0, 3]
    assert coreset_of("coreset:m=2,scope=batch", two) == [0, 1]


def test_random_sets_change_with_layer_forward_and_seed_and_nothing_else():
    scores = Scores(torch.randn(1, 5, 64), RouterSpec(64, 8, "softmax", True), forward_indices=(3,))
    first = coreset_of("random:beta=0.25", scores)
    assert len(first) == 16
    assert coreset_of("random:beta=0.25", replace(scores, logits=torch.randn(1, 9, 64))) == first
    assert coreset_of("random:beta=0.25", replace(scores, layer=1)) != first
    assert coreset_of("random:beta=0.25", replace(scores, forward_indices=(4,))) != first
    assert coreset_of("random:beta=0.25,seed=1", scores) != first


def test_resident_experts_are_preferred_within_the_vote_loss():
    resident = torch.tensor([False, False, False, False, True, False])
    scores = Scores(BLOCK, SIGMOID, resident=resident)  # votes .9, 1.1, .2, .6, .5, 0
    assert coreset_of("resident-vote:beta=0.5,lam=0,eps=1", scores) == [0, 1, 3]
    assert coreset_of("resident-vote:beta=0.5,lam=1,eps=0.1", scores) == [0, 1, 4]
    assert coreset_of("resident-vote:beta=0.5,lam=1,eps=0.02", scores) == [0, 1, 3]
    assert coreset_of("resident-vote:beta=0.5,lam=9,eps=0.02", scores) == [0, 1, 3]
    assert coreset_of("resident-vote:beta=0.5", replace(scores, resident=None)) == [0, 1, 3]


def test_restoring_votes_takes_the_fewest_swaps():
    votes = torch.tensor([[50, 40, 30, 20, 10, 5]])
    plain = torch.tensor([[True, True, True, False, False, False]])
    bonus_coreset = ~plain
    for max_vote_loss, expected in [
        (0.8, [3, 4, 5]),
        (0.35, [0, 3, 4]),
        (0.1, [0, 1, 3]),
        (0, [0, 1, 2]),
    ]:
        restored = restore_votes(bonus_coreset, plain, votes, max_vote_loss)
        assert restored[0].nonzero().flatten().tolist() == expected


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.data())
@law(60)
def test_taking_by_budget_is_a_sorted_walk(votes: list[int], data: st.DataObject):
    protected = data.draw(st.lists(st.booleans(), min_size=len(votes), max_size=len(votes)))
    m = data.draw(st.integers(1, 35))
    order = sorted(range(len(votes)), key=lambda e: (not protected[e], -votes[e], e))
    expected = sorted(order[: max(m, sum(protected))])
    assert _coreset(votes, protected, Fixed(m)) == expected


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.floats(0.01, 1), st.integers(1, 9))
@law(60)
def test_taking_by_mass_is_the_shortest_walk_that_holds_it(
    votes: list[int], tau: float, min_experts: int
):
    coreset = _coreset(votes, [False] * len(votes), Mass(tau, min_experts))
    assert len(coreset) >= min(min_experts, len(votes))
    mass = sum(votes[e] for e in coreset)
    assert mass >= tau * sum(votes) - 1e-9
    if len(coreset) > min_experts:
        assert mass - min(votes[e] for e in coreset) < tau * sum(votes)


def test_votes_of_many_tokens_add_up_exactly():
    """In fp32 the sum of 100,000 small votes would depend on their order."""
    scores = Scores(torch.full((1, 100_000, 4), -3.0), RouterSpec(4, 4, "sigmoid", True))
    assert coreset_of("coreset:m=2", scores) == [0, 1]


def _only(*experts: int) -> Policy:
    class Only:
        def eligible(self, scores: Scores, k: int) -> Tensor:
            mask = torch.zeros(1, 1, scores.router.experts, dtype=torch.bool)
            mask[..., list(experts)] = True
            return mask

    return Only()


def _coreset(votes: list[int], protected: list[bool], size: Fixed | Mass) -> list[int]:
    first = torch.tensor([protected])
    mask = take_first(*rank_by_votes(torch.tensor([votes]), first), first, size, 1)
    return mask[0].nonzero().flatten().tolist()
