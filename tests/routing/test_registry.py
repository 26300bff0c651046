"""Policy texts: each policy has one, it parses back, and errors name what is wrong."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from policy_strategies import law, spellings

from coterie.errors import CoterieError
from coterie.routing import (
    DesVote,
    Election,
    format_policy,
    parse_policy,
    update_policies_in_json,
    update_policy_text,
)


@pytest.mark.parametrize(
    "text",
    [
        "vanilla",
        "topk:k=4",
        "naee:beta=0.6",
        "mc-moe:beta=0.6,protect=0.02",
        "des-seq:k=3",
        "des-vote:beta=0.15",
        "des-vote:beta=0.15,voters=before-eos,protect=top1,vote=weight",
        "uniform-vote:beta=0.15",
        "xshare:beta=0.15",
        "racing:m=48",
        "mass-vote:tau=0.8",
        "mass-vote:tau=0.8,least=16",
        "random:beta=0.15",
        "random:beta=0.15,seed=7",
        "resident-vote:beta=0.15,resident_bonus=0.5,max_vote_loss=0.02",
        "xshare:beta=0.15,protect=none",
        "coreset:m=48,vote=full,scope=batch,resident_bonus=1,max_vote_loss=0.1",
        "coreset:k=2,voters=masked",
        "proportional-vote:beta=0.15",
        "proportional-vote:beta=0.3/0.2,voters=masked,protect=top1",
        "priced-vote:price=0.17",
        "coreset:price=0.3,vote=margin",
        "coreset:beta=0.15,vote=count,tally=proportional",
        "des-vote:beta=1",
        "des-vote:beta=1e-05",
    ],
)
def test_a_canonical_text_formats_unchanged(text: str):
    assert format_policy(parse_policy(text)) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        (" des-vote: vote=weight , beta=.150 ", "des-vote:beta=0.15,vote=weight"),
        ("des-vote:beta=1.0,voters=all,eps=0.02", "des-vote:beta=1"),
        ("mc-moe:beta=0.5", "mc-moe:beta=0.5,protect=0.02"),
        ("resident-vote:beta=0.5", "resident-vote:beta=0.5,resident_bonus=1,max_vote_loss=0.02"),
        ("xshare:beta=0.5,protect=top1", "xshare:beta=0.5"),
    ],
)
def test_another_text_formats_as_the_canonical_one(text: str, printed: str):
    assert format_policy(parse_policy(text)) == printed


@given(spellings())
@law(100)
def test_every_combination_of_options_round_trips(text: str):
    policy = parse_policy(text)
    assert parse_policy(format_policy(policy)) == policy
    assert format_policy(parse_policy(format_policy(policy))) == format_policy(policy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "des-vot:beta=1",
            "unknown policy 'des-vot'; known: coreset, des-seq, des-vote, ",
        ),
        ("", "unknown policy ''; known: "),
        ("des_vote:beta=0.3", "did you mean 'des-vote'?"),
        ("DES-SEQ:k=3", "did you mean 'des-seq'?"),
        ("vanilla:k=1", "unknown option 'k'; it has: none"),
        ("topk", "needs k"),
        ("des-vote:vote=weight", "needs beta"),
        ("des-vote:beta=0.1,tau=1", "unknown option 'tau'; it has: beta, voters, protect, vote"),
        ("des-seq:k=3,protect=top1", "unknown option 'protect'; it has: k, voters, scope"),
        ("uniform-vote:beta=0.1,vote=full", "unknown option 'vote'"),
        ("des-vote:beta=much", "beta must be a number, not 'much'"),
        ("des-vote:beta=0", "beta must be above 0 and at most 1, not 0.0"),
        ("des-vote:beta=1.01", "beta must be above 0 and at most 1"),
        ("des-vote:beta=nan", "beta must be above 0 and at most 1, not nan"),
        ("des-vote:beta=0.1,resident_bonus=inf", "resident_bonus must be at least 0, not inf"),
        ("des-vote:beta=0.1,lam=-1", "resident_bonus must be at least 0, not -1.0"),
        ("topk:k=1.5", "k must be a whole number, not '1.5'"),
        ("topk:k=0", "k must be at least 1, not 0"),
        (
            "des-vote:beta=0.1,voters=some",
            "voters must be one of all, before-eos, masked, uncertain",
        ),
        ("des-vote:beta", "'beta' is not of the form option=value"),
        ("des-vote:beta=", "'beta=' is not of the form option=value"),
        ("des-vote:beta=0.1,", "'' is not of the form option=value"),
        ("des-vote:beta=0.1,beta=0.2", "beta is given twice"),
        ("coreset:vote=full", "takes exactly one of beta, m, tau, price, k"),
        ("coreset:beta=0.1,m=2", "takes exactly one of beta, m, tau, price, k"),
        ("coreset:m=2,least=2", "least needs tau"),
    ],
)
def test_an_invalid_text_is_an_error_of_one_line(text: str, message: str):
    with pytest.raises(CoterieError, match=re.escape(message)) as error:
        parse_policy(text)
    assert "\n" not in str(error.value)


def test_policies_in_code_are_checked():
    with pytest.raises(CoterieError, match="beta must be above 0"):
        DesVote(beta=2)
    with pytest.raises(CoterieError, match="resident_bonus must be at least 0"):
        Election(resident_bonus=-1)
    assert format_policy(DesVote(beta=1)) == "des-vote:beta=1"


def test_a_policy_outside_the_table_has_no_text():
    class Custom:
        def eligible(self, scores, k):
            return scores

    with pytest.raises(CoterieError, match="has no name; known: coreset"):
        format_policy(Custom())


def test_equal_policies_have_one_hash():
    assert len({parse_policy("des-vote:beta=0.5"), parse_policy("des-vote:beta=.5")}) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("des-vote:beta=0.3,lam=1,eps=0.1", "des-vote:beta=0.3,resident_bonus=1,max_vote_loss=0.1"),
        ("des-vote:beta=0.3,voters=unfilled", "des-vote:beta=0.3,voters=before-eos"),
        ("coreset:m=3,vote=count,most=slots", "coreset:m=3,vote=count,max=slots"),
        ("xshare:beta=0.5,most=7", "xshare:beta=0.5,max=7"),
        ("uniform-vote:beta=0.3/0.2,lam=2", "uniform-vote:beta=0.3/0.2,resident_bonus=2"),
    ],
)
def test_old_names_are_read_and_formatted_as_new_ones(old: str, new: str):
    assert format_policy(parse_policy(old)) == new
    assert update_policy_text(f"{old} block=16; {old}") == f"{new} block=16; {new}"
    document = {old: [old, 1, {"skipped": old}]}
    updated = {new: [new, 1, {"skipped": old}]}
    assert update_policies_in_json(document, skip_keys=("skipped",)) == updated


def test_a_value_alias_is_read():
    for word in ("masked", "topk-prob"):
        assert format_policy(parse_policy(f"des-vote:beta=0.3,vote={word}")) == "des-vote:beta=0.3"
    assert update_policy_text("des-vote:beta=0.3,vote=masked") == "des-vote:beta=0.3,vote=topk-prob"
    assert update_policy_text("what:lam=1 unroll:most=4") == "what:lam=1 unroll:most=4"
    with pytest.raises(CoterieError, match="resident_bonus is given twice"):
        parse_policy("des-vote:beta=0.3,lam=1,resident_bonus=1")
