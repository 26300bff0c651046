"""What kernels are told of a policy, and that what they route equals plain torch by value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from coterie import ops
from coterie.routing import parse_policy, route
from coterie.routing.select import Ruled, Ruling, route_by_mask
from coterie.values import Policy, Progress, RouterSpec, Routing, Rule, Scores

ROUTER = RouterSpec(experts=32, k=4, activation="sigmoid", renormalise=True)
SCORES = Scores(
    torch.linspace(-2, 2, 2 * 6 * 32).sin().view(2, 6, 32),
    ROUTER,
    progress=Progress(filled=torch.zeros(2, 6, dtype=torch.bool)),
)


def ruling(text: str, scores: Scores = SCORES) -> Ruling | None:
    policy = parse_policy(text)
    return policy.ruling(scores, scores.router.k) if isinstance(policy, Ruled) else None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("vanilla", None),
        ("des-seq:k=4", None),
        ("des-seq:k=3", Rule(union=3)),
        ("des-seq:k=4,voters=unfilled", Rule(union=4)),
        ("des-vote:beta=0.15", Rule(count=4, eps=0.02)),
        ("des-vote:beta=0.5,vote=weight,protect=top1", Rule("weight", 0, 16, protect=1, eps=0.02)),
        ("uniform-vote:beta=0.01", Rule("count", count=1, eps=0.02)),
        ("xshare:beta=1", Rule("full", count=32, protect=1, eps=0.02)),
        ("racing:m=48", Rule("max", count=32, eps=0.02)),
        ("mass-vote:tau=0.8", Rule(mass=0.8, least=4, eps=0.02)),
        ("mass-vote:tau=0.8,least=40", Rule(mass=0.8, least=32, eps=0.02)),
        ("resident-vote:beta=0.5,lam=2,eps=0.1", Rule(count=16, lam=2.0, eps=0.1)),
        ("coreset:m=3,vote=margin", Rule("margin", count=3, eps=0.02)),
    ],
)
def test_a_policy_tells_its_rule_in_plain_numbers(text: str, rule: Rule | None):
    told = ruling(text)
    assert told is not None
    assert told.rule == rule


@pytest.mark.parametrize(
    "text",
    ["naee:beta=0.6", "mc-moe:beta=0.6", "random:beta=0.5", "coreset:m=3,vote=random"],
)
def test_what_plain_numbers_cannot_say_has_no_rule(text: str):
    assert ruling(text) is None


def test_a_list_of_budgets_is_the_layers_own_rule():
    told = ruling("des-vote:beta=0.25/0.5", replace(SCORES, ordinal=1))
    assert told is not None
    assert told.rule == Rule(count=16, eps=0.02)


def test_everybody_has_one_vote_unless_somebody_says_otherwise():
    voters = torch.tensor([[1.0] * 3 + [0.0] * 3] * 2)
    filled = torch.tensor([[False] * 2 + [True] * 4] * 2)
    scores = replace(SCORES, voters=voters, progress=Progress(filled=filled))
    everybody, engine = ruling("des-vote:beta=0.5"), ruling("des-vote:beta=0.5", scores)
    unfilled = ruling("des-vote:beta=0.5,voters=unfilled", scores)
    assert everybody is not None
    assert engine is not None
    assert unfilled is not None
    assert everybody.voice is None
    assert engine.voice is not None
    assert unfilled.voice is not None
    assert torch.equal(engine.voice, voters)
    assert torch.equal(unfilled.voice, torch.tensor([[1.0] * 2 + [0.0] * 4] * 2))


def test_rows_that_share_a_coreset_are_ruled_as_one():
    told = ruling("des-vote:beta=0.5,scope=batch")
    assert told is not None
    assert torch.equal(told.scores.logits, SCORES.logits.view(1, 12, 32))


def test_routing_asks_the_kernel_first_and_torch_where_there_is_none(monkeypatch):
    asked: list[Rule | None] = []
    made = route_by_mask(SCORES, parse_policy("vanilla"))

    def kernel(scores: Scores, rule: Rule | None, voice: Tensor | None) -> Routing | None:
        asked.append(rule)
        return made if rule is None else None

    monkeypatch.setattr(ops, "route", kernel)
    assert route(SCORES, parse_policy("vanilla")) is made
    plain = route(SCORES, parse_policy("des-seq:k=1"))
    assert torch.equal(plain.ids, route_by_mask(SCORES, parse_policy("des-seq:k=1")).ids)
    assert asked == [None, Rule(union=1)]


def test_a_policy_of_a_callers_own_needs_no_ruling():
    @dataclass(frozen=True)
    class Evens:
        def eligible(self, scores: Scores, k: int) -> Tensor:
            return (torch.arange(scores.router.experts) % 2 == 0).view(1, 1, -1)

    policy: Policy = Evens()
    ids = route(SCORES, policy).ids
    assert bool((ids % 2 == 0).all())
