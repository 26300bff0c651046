"""Proportional elections: one seat after the other, and who has his own weighs less."""

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
    """Ballots [2, N, E], voices [2, N] and experts that come first [2, E], with many ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    tokens, experts = draw(st.integers(1, 12)), draw(st.integers(2, 24))
    ballots = torch.randint(0, draw(st.integers(2, 9)), (2, tokens, experts), generator=generator)
    voice = torch.randint(0, 4, (2, tokens), generator=generator) / 2
    first = torch.rand(2, experts, generator=generator) < draw(st.sampled_from((0, 0.2)))
    return ballots.float() / 4, voice, first


@given(elections())
@law(150)
def test_each_seat_goes_where_the_votes_not_yet_seated_are(drawn):
    """The rule once more in plain whole numbers, one row, one seat at a time."""
    ballots, voice, first = drawn
    experts = first.shape[-1]
    order, gains = elect_sequentially(ballots, voice, first, max_steps=experts, k=1, min_gain=0.0)
    for row in range(2):
        expected = _walk(ballots[row], voice[row].tolist(), first[row].tolist())
        assert list(zip(order[row].tolist(), gains[row].tolist(), strict=True)) == expected


@given(elections())
@law()
def test_gains_never_rise_after_the_protected(drawn):
    ballots, voice, first = drawn
    _, gains = elect_sequentially(
        ballots, voice, first, max_steps=first.shape[-1], k=1, min_gain=0.0
    )
    for row in range(2):
        rest = gains[row, int(first[row].sum()) :].tolist()
        assert rest == sorted(rest, reverse=True)


@given(elections(), st.integers(1, 12))
@law()
def test_a_shorter_walk_is_the_beginning_of_a_longer_one(drawn, most: int):
    ballots, voice, first = drawn
    assume(most <= first.shape[-1])
    whole, _ = elect_sequentially(
        ballots, voice, first, max_steps=first.shape[-1], k=1, min_gain=0.0
    )
    part, _ = elect_sequentially(ballots, voice, first, max_steps=most, k=1, min_gain=0.0)
    assert torch.equal(part, whole[:, :most])


@given(elections(), st.sampled_from((0.0, 0.25, 1.0, 7.0)), st.sampled_from((0.0, 0.02, 0.3, 1.0)))
@law(150)
def test_residents_are_favoured_within_the_bound(drawn, lam: float, eps: float):
    """The rule once more, seat by seat; what was lost is never more than the bound."""
    ballots, voice, first = drawn
    resident = torch.rand(first.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    favour = ResidencyBonus(resident, lam, eps)
    experts = first.shape[-1]
    order, gains = elect_sequentially(
        ballots, voice, first, max_steps=experts, k=1, min_gain=0.0, bonus=favour
    )
    for row in range(2):
        alone = ResidencyBonus(resident[row], lam, eps)
        walk, could, lost = _favoured(ballots[row], voice[row].tolist(), first[row].tolist(), alone)
        assert list(zip(order[row].tolist(), gains[row].tolist(), strict=True)) == walk
        assert lost <= eps * could


@given(elections(), st.sampled_from((0.5, 3.0)), st.booleans())
@law()
def test_favouring_all_or_nobody_elects_the_same(drawn, lam: float, everybody: bool):
    ballots, voice, first = drawn
    favour = ResidencyBonus(torch.full_like(first, everybody), lam, 1.0)
    experts = first.shape[-1]
    plain, gains = elect_sequentially(ballots, voice, first, max_steps=experts, k=1, min_gain=0.0)
    order, taken = elect_sequentially(
        ballots, voice, first, max_steps=experts, k=1, min_gain=0.0, bonus=favour
    )
    assert torch.equal(order, plain)
    assert torch.equal(taken, (gains.double() * (1 + lam * everybody)).long())


@given(blocks(), st.floats(0.01, 1), st.sampled_from(("beta=0.5", "m=3", "price=0.2", "tau=0.8")))
@law(80)
def test_without_a_loss_residency_only_breaks_ties(scores: Scores, lam: float, size: str):
    """At eps=0 each seat gains what the best there was gains."""
    options = f"coreset:{size},tally=proportional,vote=margin"
    k, experts = scores.router.k, scores.router.experts
    same = replace(scores, resident=torch.zeros(experts, dtype=torch.bool))
    plain, alike = (parse_policy(f"{options}{more}") for more in ("", f",lam={lam!r},eps=0"))
    assert torch.equal(plain.eligible(scores, k), plain.eligible(same, k))
    assert torch.equal(plain.eligible(same, k), alike.eligible(same, k))
    if not size.startswith(("price", "tau")):  # there residents come cheaper, so that more do
        before, after = (p.eligible(scores, k)[:, 0].sum(-1) for p in (plain, alike))
        assert torch.equal(before, after)


def test_a_resident_takes_the_seat_of_one_that_is_hardly_better():
    """Two tokens, one vote each for an expert of its own; the second is worth a tenth less."""
    ballots, voice = torch.eye(2)[None], torch.tensor([[1.0, 0.9]])
    here = torch.tensor([False, True])
    nobody = torch.zeros(1, 2, dtype=torch.bool)
    seated = {
        (lam, eps): elect_sequentially(
            ballots,
            voice,
            nobody,
            max_steps=1,
            k=1,
            min_gain=0.0,
            bonus=ResidencyBonus(here, lam, eps),
        )[0].item()
        for lam in (0.1, 0.2)
        for eps in (0.09, 0.11)
    }
    assert seated == {(0.1, 0.09): 0, (0.1, 0.11): 0, (0.2, 0.09): 0, (0.2, 0.11): 1}


def test_who_is_here_comes_cheaper():
    """The third seat is worth .08: not the price, but a quarter of it."""
    block = Scores(_logits((0.9, 0.1, 0.1, 0.1, 0.1, 0.1), (0.1, 0.5, 0.4, 0.1, 0.1, 0.1)), SIGMOID)
    here = replace(block, resident=torch.tensor([False, False, True, False, False, False]))
    assert _elected("priced-vote:price=0.2", here) == [0, 1]
    assert _elected("priced-vote:price=0.2,resident_bonus=3,max_vote_loss=0", block) == [0, 1]
    assert _elected("priced-vote:price=0.2,resident_bonus=3,max_vote_loss=0", here) == [0, 1, 2]


@given(elections())
@law()
def test_a_token_without_a_voice_changes_nothing(drawn):
    ballots, voice, first = drawn
    experts = first.shape[-1]
    silent = torch.cat([voice, torch.zeros_like(voice)], dim=1)
    more = torch.cat([ballots, ballots.flip(-1)], dim=1)
    for one, other in zip(
        elect_sequentially(ballots, voice, first, max_steps=experts, k=1, min_gain=0.0),
        elect_sequentially(more, silent, first, max_steps=experts, k=1, min_gain=0.0),
        strict=True,
    ):
        assert torch.equal(one, other)


@given(elections())
@law()
def test_shares_of_a_ballot_never_pass_the_whole(drawn):
    parts = split_votes(drawn[0])
    total, empty = parts.sum(-1), (drawn[0] == 0).all(-1)
    assert bool((total <= VOTE_PARTS).all())
    assert bool((total[~empty] > VOTE_PARTS - parts.shape[-1]).all())
    assert bool((total[empty] == 0).all())


@given(blocks(), st.floats(0.001, 3), st.floats(0.001, 3), st.sampled_from(("none", "top1")))
@law(100)
def test_a_higher_price_elects_fewer_of_the_same(scores: Scores, one: float, other: float, protect):
    cheap, dear = (
        parse_policy(f"priced-vote:price={price!r},protect={protect}").eligible(scores, 1)
        for price in sorted((one, other))
    )
    assert bool((dear <= cheap).all())


@given(blocks(), st.floats(0.001, 3))
@law(100)
def test_a_price_elects_all_that_a_walk_to_the_end_finds_worth_it(scores: Scores, price: float):
    """Ending the walk early loses nobody, whatever the other rows still want."""
    k = scores.router.k
    coreset = parse_policy(f"priced-vote:price={price!r}").eligible(scores, k)[:, 0]
    policy = parse_policy("coreset:m=64,vote=margin,tally=proportional")
    assert bool((policy.eligible(scores, k)).all())
    for row, size in enumerate(coreset.sum(-1).tolist()):
        share = (size + 0.5) / scores.router.experts
        same = parse_policy(f"proportional-vote:beta={min(share, 1.0)!r}").eligible(scores, k)
        assert torch.equal(same[row, 0], coreset[row])
        assert size >= min(k, scores.router.experts)


def test_an_odd_token_is_heard_among_many_alike():
    """Nine tokens of one mind fill a plain coreset; in proportion the tenth gets its expert."""
    block = Scores(
        _logits(*9 * [(0.9, 0.8, 0.7, 0.6, 0.1, 0.1)], (0.1, 0.1, 0.1, 0.1, 0.6, 0.9)), FOUR
    )
    assert _elected("des-vote:beta=0.67", block) == [0, 1, 2, 3]
    assert _elected("proportional-vote:beta=0.67", block) == [0, 1, 2, 5]


def test_a_price_is_what_one_tokens_vote_is_worth():
    """Ballots 3/4 and 1/4: the first seat gains .75 of each token, the second 1/4 * (1/4)**2."""
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


def test_margins_are_measured_from_the_expert_that_a_token_would_take_next():
    scores = Scores(_logits((0.9, 0.6, 0.5, 0.1, 0.1, 0.1)), SIGMOID)
    expected = torch.tensor([[[0.8, 0.2, 0, 0, 0, 0]]])
    torch.testing.assert_close(topk_margin(scores), expected, atol=2e-3, rtol=0)


@given(blocks())
@law()
def test_every_token_splits_one_vote_by_margin_among_its_own(scores: Scores):
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
def test_what_cannot_be_in_proportion_is_named(text: str, message: str):
    with pytest.raises(CoterieError, match=message):
        parse_policy(text)


FOUR = replace(SIGMOID, k=4)


def _walk(ballots: Tensor, voice: list[float], first: list[bool]) -> list[tuple[int, int]]:
    parts = []
    for ballot in ballots.tolist():
        units = [round(share * VOTE_PARTS) for share in ballot]
        parts.append([unit * VOTE_PARTS // max(1, sum(units)) for unit in units])
    lacking, left, walk = [VOTE_PARTS] * len(parts), set(range(len(first))), []
    while left:
        weight = [
            round(say * 2**20) * part * part >> 28 for say, part in zip(voice, lacking, strict=True)
        ]
        gain = {e: sum(w * p[e] for w, p in zip(weight, parts, strict=True)) for e in left}
        best = min(left, key=lambda e: (not first[e], -gain[e], e))
        walk.append((best, gain[best]))
        lacking = [part - p[best] for part, p in zip(lacking, parts, strict=True)]
        left.remove(best)
    return walk


def _favoured(ballots: Tensor, voice: list[float], first: list[bool], favour: ResidencyBonus):
    """The walk, the best gains there were, and what of them was lost."""
    parts = []
    for ballot in ballots.tolist():
        units = [round(share * VOTE_PARTS) for share in ballot]
        parts.append([unit * VOTE_PARTS // max(1, sum(units)) for unit in units])
    here, lam, eps = favour.resident.tolist(), favour.factor, favour.max_vote_loss
    lacking, left, walk, could, lost = [VOTE_PARTS] * len(parts), set(range(len(first))), [], 0, 0
    while left:
        weight = [
            round(say * 2**20) * part * part >> 28 for say, part in zip(voice, lacking, strict=True)
        ]
        gain = {e: sum(w * p[e] for w, p in zip(weight, parts, strict=True)) for e in left}
        taken = {e: gain[e] * (1 + lam) if here[e] else float(gain[e]) for e in left}
        plain = min(left, key=lambda e: (not first[e], -gain[e], e))
        liked = min(left, key=lambda e: (not first[e], -taken[e] / (1 + lam), e))
        loss = gain[plain] - gain[liked]
        could += gain[plain]
        best = liked if lost + loss <= eps * could else plain
        lost += loss if best == liked else 0
        walk.append((best, int(taken[best])))
        lacking = [part - p[best] for part, p in zip(lacking, parts, strict=True)]
        left.remove(best)
    return walk, could, lost


def _elected(text: str, scores: Scores) -> list[int]:
    mask = parse_policy(text).eligible(scores, scores.router.k)
    return mask[0, 0].nonzero().flatten().tolist()


def _logits(*probabilities: tuple[float, ...]) -> Tensor:
    """[1, N, E] whose sigmoid these are."""
    return torch.tensor([[[math.log(p / (1 - p)) for p in row] for row in probabilities]])


def test_a_price_is_held_against_votes_to_the_last_unit():
    """Votes are whole numbers up to 2**46: float32, torch's own choice, would lose their end."""
    votes = torch.tensor([[2**40, 2**39 + 1, 2**39 - 1, 5]])
    assert Priced(0.5).count(votes, 1).tolist() == [[2]]
