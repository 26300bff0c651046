"""Proportional elections: one expert at a time; tokens with elected experts weigh less."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from policy_strategies import law
from score_strategies import blocks
from torch import Tensor

from coterie.errors import CoterieError
from coterie.routing import parse_policy
from coterie.routing.proportional import VOTE_PARTS, ResidencyBonus, elect_sequentially, split_votes
from coterie.routing.size import Priced
from coterie.routing.votes import VOTE_UNIT, topk_margin
from coterie.values import RouterSpec, Scores

SIGMOID = RouterSpec(experts=6, k=2, activation="sigmoid", renormalise=True)


@st.composite
def elections(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Ballots [2, N, E], vote weights [2, N] and protected experts [2, E], with many ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    tokens, experts = draw(st.integers(1, 12)), draw(st.integers(2, 24))
    ballots = torch.randint(0, draw(st.integers(2, 9)), (2, tokens, experts), generator=generator)
    vote_weight = torch.randint(0, 4, (2, tokens), generator=generator) / 2
    protected = torch.rand(2, experts, generator=generator) < draw(st.sampled_from((0, 0.2)))
    return ballots.float() / 4, vote_weight, protected


@given(elections())
@law(60)
def test_elected_experts_match_a_plain_implementation(election):
    """With plain integers, one row and one expert at a time."""
    ballots, vote_weight, protected = election
    experts = protected.shape[-1]
    order, gains = elect_sequentially(
        ballots, vote_weight, protected, max_steps=experts, k=1, min_gain=0.0
    )
    for row in range(2):
        expected = _walk(ballots[row], vote_weight[row].tolist(), protected[row].tolist())
        assert list(zip(order[row].tolist(), gains[row].tolist(), strict=True)) == expected


@given(elections())
@law()
def test_gains_never_rise_after_the_protected(election):
    ballots, vote_weight, protected = election
    _, gains = elect_sequentially(
        ballots, vote_weight, protected, max_steps=protected.shape[-1], k=1, min_gain=0.0
    )
    for row in range(2):
        rest = gains[row, int(protected[row].sum()) :].tolist()
        assert rest == sorted(rest, reverse=True)


@given(elections(), st.integers(1, 12))
@law()
def test_fewer_steps_elect_the_first_of_more_steps(election, steps: int):
    ballots, vote_weight, protected = election
    assume(steps <= protected.shape[-1])
    whole, _ = elect_sequentially(
        ballots, vote_weight, protected, max_steps=protected.shape[-1], k=1, min_gain=0.0
    )
    part, _ = elect_sequentially(
        ballots, vote_weight, protected, max_steps=steps, k=1, min_gain=0.0
    )
    assert torch.equal(part, whole[:, :steps])


@given(elections(), st.sampled_from((0.0, 0.25, 1.0, 7.0)), st.sampled_from((0.0, 0.02, 0.3, 1.0)))
@law(60)
def test_the_resident_bonus_stays_within_the_loss(election, factor: float, max_vote_loss: float):
    """Against a plain implementation; the lost gain never exceeds the bound."""
    ballots, vote_weight, protected = election
    resident = torch.rand(protected.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    bonus = ResidencyBonus(resident, factor, max_vote_loss)
    experts = protected.shape[-1]
    order, gains = elect_sequentially(
        ballots, vote_weight, protected, max_steps=experts, k=1, min_gain=0.0, bonus=bonus
    )
    for row in range(2):
        alone = ResidencyBonus(resident[row], factor, max_vote_loss)
        expected, best_gain, lost = _walk_with_bonus(
            ballots[row], vote_weight[row].tolist(), protected[row].tolist(), alone
        )
        assert list(zip(order[row].tolist(), gains[row].tolist(), strict=True)) == expected
        assert lost <= max_vote_loss * best_gain


@given(elections(), st.sampled_from((0.5, 3.0)), st.booleans())
@law()
def test_a_bonus_for_all_or_none_changes_no_order(election, factor: float, all_resident: bool):
    ballots, vote_weight, protected = election
    bonus = ResidencyBonus(torch.full_like(protected, all_resident), factor, 1.0)
    experts = protected.shape[-1]
    plain, gains = elect_sequentially(
        ballots, vote_weight, protected, max_steps=experts, k=1, min_gain=0.0
    )
    order, taken = elect_sequentially(
        ballots, vote_weight, protected, max_steps=experts, k=1, min_gain=0.0, bonus=bonus
    )
    assert torch.equal(order, plain)
    assert torch.equal(taken, (gains.double() * (1 + factor * all_resident)).long())


@given(blocks(), st.floats(0.01, 1), st.sampled_from(("beta=0.5", "m=3", "price=0.2", "tau=0.8")))
@law(80)
def test_without_a_loss_the_bonus_only_breaks_ties(scores: Scores, factor: float, size: str):
    """With max_vote_loss=0 every elected expert has the best gain."""
    options = f"coreset:{size},tally=proportional,vote=margin"
    k, experts = scores.router.k, scores.router.experts
    same = replace(scores, resident=torch.zeros(experts, dtype=torch.bool))
    plain, alike = (
        parse_policy(f"{options}{more}")
        for more in ("", f",resident_bonus={factor!r},max_vote_loss=0")
    )
    assert torch.equal(plain.eligible(scores, k), plain.eligible(same, k))
    assert torch.equal(plain.eligible(same, k), alike.eligible(same, k))
    if not size.startswith(("price", "tau")):  # these count the bonus, so they elect more
        before, after = (p.eligible(scores, k)[:, 0].sum(-1) for p in (plain, alike))
        assert torch.equal(before, after)


def test_a_resident_expert_replaces_one_that_is_little_better():
    """Two tokens with one vote each for their own expert; the second has 0.9 of the weight."""
    ballots, vote_weight = torch.eye(2)[None], torch.tensor([[1.0, 0.9]])
    resident = torch.tensor([False, True])
    protected = torch.zeros(1, 2, dtype=torch.bool)
    elected = {
        (factor, max_vote_loss): elect_sequentially(
            ballots,
            vote_weight,
            protected,
            max_steps=1,
            k=1,
            min_gain=0.0,
            bonus=ResidencyBonus(resident, factor, max_vote_loss),
        )[0].item()
        for factor in (0.1, 0.2)
        for max_vote_loss in (0.09, 0.11)
    }
    assert elected == {(0.1, 0.09): 0, (0.1, 0.11): 0, (0.2, 0.09): 0, (0.2, 0.11): 1}


def test_a_resident_expert_needs_a_lower_gain():
    """The third expert gains .08: below the price, above a quarter of it."""
    block = Scores(_logits((0.9, 0.1, 0.1, 0.1, 0.1, 0.1), (0.1, 0.5, 0.4, 0.1, 0.1, 0.1)), SIGMOID)
    with_resident = replace(block, resident=torch.tensor([False, False, True, False, False, False]))
    assert _elected("priced-vote:price=0.2", with_resident) == [0, 1]
    assert _elected("priced-vote:price=0.2,resident_bonus=3,max_vote_loss=0", block) == [0, 1]
    assert _elected("priced-vote:price=0.2,resident_bonus=3,max_vote_loss=0", with_resident) == [
        0,
        1,
        2,
    ]


@given(elections())
@law()
def test_a_token_without_a_vote_changes_nothing(election):
    ballots, vote_weight, protected = election
    experts = protected.shape[-1]
    more_weights = torch.cat([vote_weight, torch.zeros_like(vote_weight)], dim=1)
    more = torch.cat([ballots, ballots.flip(-1)], dim=1)
    for one, other in zip(
        elect_sequentially(ballots, vote_weight, protected, max_steps=experts, k=1, min_gain=0.0),
        elect_sequentially(more, more_weights, protected, max_steps=experts, k=1, min_gain=0.0),
        strict=True,
    ):
        assert torch.equal(one, other)


@given(elections())
@law()
def test_the_parts_of_a_ballot_never_exceed_one_vote(election):
    parts = split_votes(election[0])
    total, empty = parts.sum(-1), (election[0] == 0).all(-1)
    assert bool((total <= VOTE_PARTS).all())
    assert bool((total[~empty] > VOTE_PARTS - parts.shape[-1]).all())
    assert bool((total[empty] == 0).all())


@given(blocks(), st.floats(0.001, 3), st.floats(0.001, 3), st.sampled_from(("none", "top1")))
@law(100)
def test_a_higher_price_elects_fewer_of_the_same(scores: Scores, one: float, other: float, protect):
    low_price, high_price = (
        parse_policy(f"priced-vote:price={price!r},protect={protect}").eligible(scores, 1)
        for price in sorted((one, other))
    )
    assert bool((high_price <= low_price).all())


@given(blocks(), st.floats(0.001, 3))
@law(100)
def test_stopping_early_loses_no_expert(scores: Scores, price: float):
    """Even if other rows continue."""
    k = scores.router.k
    coreset = parse_policy(f"priced-vote:price={price!r}").eligible(scores, k)[:, 0]
    policy = parse_policy("coreset:m=64,vote=margin,tally=proportional")
    assert bool((policy.eligible(scores, k)).all())
    for row, size in enumerate(coreset.sum(-1).tolist()):
        share = (size + 0.5) / scores.router.experts
        same = parse_policy(f"proportional-vote:beta={min(share, 1.0)!r}").eligible(scores, k)
        assert torch.equal(same[row, 0], coreset[row])
        assert size >= min(k, scores.router.experts)


def test_an_unusual_token_gets_its_expert():
    """Nine equal tokens fill a plain coreset; proportionally the tenth gets its expert."""
    block = Scores(
        _logits(*9 * [(0.9, 0.8, 0.7, 0.6, 0.1, 0.1)], (0.1, 0.1, 0.1, 0.1, 0.6, 0.9)), FOUR
    )
    assert _elected("des-vote:beta=0.67", block) == [0, 1, 2, 3]
    assert _elected("proportional-vote:beta=0.67", block) == [0, 1, 2, 5]


def test_a_price_of_1_is_one_vote():
    """Ballots 3/4 and 1/4: the first expert gains .75, the second 1/4 * (1/4)**2."""
    ballots = torch.tensor([[[3.0, 1.0]]])
    _, gains = elect_sequentially(
        ballots,
        torch.ones(1, 1),
        torch.zeros(1, 2, dtype=torch.bool),
        max_steps=2,
        k=1,
        min_gain=0.0,
    )
    assert gains.tolist() == [[0.75 * VOTE_UNIT, VOTE_UNIT / 64]]


def test_margins_are_above_the_next_best_expert():
    scores = Scores(_logits((0.9, 0.6, 0.5, 0.1, 0.1, 0.1)), SIGMOID)
    expected = torch.tensor([[[0.8, 0.2, 0, 0, 0, 0]]])
    torch.testing.assert_close(topk_margin(scores), expected, atol=2e-3, rtol=0)


@given(blocks())
@law()
def test_every_token_splits_one_vote_among_its_top_k(scores: Scores):
    ballots = topk_margin(scores)
    torch.testing.assert_close(ballots.sum(-1), torch.ones(ballots.shape[:2]))
    assert bool(((ballots > 0).sum(-1) == scores.router.k).all())
    assert bool((ballots >= 0).all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("coreset:m=2,vote=max,tally=proportional", "needs a vote that each token casts: one of "),
        (
            "des-vote:beta=0.2,vote=random,tally=proportional",
            "topk-prob, weight, count, full, margin",
        ),
        ("priced-vote:price=0", "price must be above 0, not 0"),
    ],
)
def test_invalid_proportional_policies_are_an_error(text: str, message: str):
    with pytest.raises(CoterieError, match=message):
        parse_policy(text)


FOUR = replace(SIGMOID, k=4)


def _walk(
    ballots: Tensor, vote_weight: list[float], protected: list[bool]
) -> list[tuple[int, int]]:
    parts = []
    for ballot in ballots.tolist():
        units = [round(share * VOTE_PARTS) for share in ballot]
        parts.append([unit * VOTE_PARTS // max(1, sum(units)) for unit in units])
    unelected, remaining, order = [VOTE_PARTS] * len(parts), set(range(len(protected))), []
    while remaining:
        weights = [
            round(weight * 2**20) * part * part >> 28
            for weight, part in zip(vote_weight, unelected, strict=True)
        ]
        gain = {e: sum(w * p[e] for w, p in zip(weights, parts, strict=True)) for e in remaining}
        best = min(remaining, key=lambda e: (not protected[e], -gain[e], e))
        order.append((best, gain[best]))
        unelected = [part - p[best] for part, p in zip(unelected, parts, strict=True)]
        remaining.remove(best)
    return order


def _walk_with_bonus(
    ballots: Tensor, vote_weight: list[float], protected: list[bool], bonus: ResidencyBonus
):
    """The elected experts, the sum of the best gains, and the part of it that was lost."""
    parts = []
    for ballot in ballots.tolist():
        units = [round(share * VOTE_PARTS) for share in ballot]
        parts.append([unit * VOTE_PARTS // max(1, sum(units)) for unit in units])
    resident, factor = bonus.resident.tolist(), bonus.factor
    unelected, remaining = [VOTE_PARTS] * len(parts), set(range(len(protected)))
    order, best_gain, lost = [], 0, 0
    while remaining:
        weights = [
            round(weight * 2**20) * part * part >> 28
            for weight, part in zip(vote_weight, unelected, strict=True)
        ]
        gain = {e: sum(w * p[e] for w, p in zip(weights, parts, strict=True)) for e in remaining}
        adjusted = {e: gain[e] * (1 + factor) if resident[e] else float(gain[e]) for e in remaining}
        best = min(remaining, key=lambda e: (not protected[e], -gain[e], e))
        preferred = min(remaining, key=lambda e: (not protected[e], -adjusted[e] / (1 + factor), e))
        loss = gain[best] - gain[preferred]
        best_gain += gain[best]
        if lost + loss <= bonus.max_vote_loss * best_gain:
            best, lost = preferred, lost + loss
        order.append((best, int(adjusted[best])))
        unelected = [part - p[best] for part, p in zip(unelected, parts, strict=True)]
        remaining.remove(best)
    return order, best_gain, lost


def _elected(text: str, scores: Scores) -> list[int]:
    mask = parse_policy(text).eligible(scores, scores.router.k)
    return mask[0, 0].nonzero().flatten().tolist()


def _logits(*probabilities: tuple[float, ...]) -> Tensor:
    """Logits [1, N, E] whose sigmoid is ``probabilities``."""
    return torch.tensor([[[math.log(p / (1 - p)) for p in row] for row in probabilities]])


def test_a_price_is_compared_with_exact_votes():
    """Votes are integers up to 2**46, which float32 rounds."""
    votes = torch.tensor([[2**40, 2**39 + 1, 2**39 - 1, 5]])
    assert Priced(0.5).count(votes, 1).tolist() == [[2]]
