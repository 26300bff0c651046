"""Which rows of a forward the policy routes, and which tokens vote."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.sglang.live_blocks import NO_REQUEST, BlockRules, LiveBlocks

MASK, TEXT = 9, 1
RULES = BlockRules(mask_id=MASK)
COMMITS = replace(RULES, route_commits=True)
PROMPTS = replace(RULES, route_prompts=True)


def live_blocks(rows: list[list[int]], fixed: list[int], rules: BlockRules = RULES) -> LiveBlocks:
    """Blocks that all start at position 4."""
    tokens = torch.tensor(rows)
    positions = torch.arange(4, 4 + tokens.shape[1]).expand_as(tokens)
    return LiveBlocks.of(tokens, positions, torch.tensor(fixed), rules)


@given(st.data(), st.booleans(), st.booleans(), st.booleans())
def test_only_current_blocks_of_requests_vote(
    data: st.DataObject, commits: bool, prompts: bool, prompt_votes: bool
) -> None:
    rules = BlockRules(MASK, commits, prompts, prompt_votes)
    rows = data.draw(st.lists(st.lists(st.sampled_from([TEXT, MASK]), min_size=4, max_size=4)))
    rows.append([TEXT] * 4)
    fixed = [data.draw(st.one_of(st.integers(0, 9), st.just(NO_REQUEST))) for _ in rows]
    blocks = live_blocks(rows, fixed, rules)
    for row, length in enumerate(fixed):
        generated = [position >= length for position in range(4, 8)]
        masked = [
            is_new and token == MASK for is_new, token in zip(generated, rows[row], strict=True)
        ]
        decoded = any(generated) if commits else any(masked)
        assert blocks.masked[row].tolist() == masked
        assert bool(blocks.routed[row]) == (decoded or (prompts and not any(generated)))
        voters = [decoded and (is_new or prompt_votes) for is_new in generated]
        assert blocks.voters[row].tolist() == [float(voter) for voter in voters]


def test_fixed_tokens_of_the_current_block_are_silent() -> None:
    blocks = live_blocks([[TEXT, TEXT, MASK, TEXT]], [6])
    assert blocks.voters.tolist() == [[0, 0, 1, 1]]


def test_a_mask_token_in_a_prompt_is_no_mask() -> None:
    blocks = live_blocks([[MASK, MASK, MASK, MASK]], [8])
    assert not blocks.masked.any()
    assert not blocks.routed.any()


def test_prompts_commits_and_padding_route_as_the_model_does() -> None:
    blocks = live_blocks([[TEXT] * 4, [TEXT] * 4, [MASK] * 4], [8, 4, NO_REQUEST])
    assert blocks.routed.tolist() == [False, False, False]
    assert not blocks.voters.any()


def test_commits_and_prompts_route_by_the_policy_where_asked() -> None:
    rows, fixed = [[TEXT] * 4, [TEXT] * 4], [8, 4]
    assert live_blocks(rows, fixed, COMMITS).routed.tolist() == [False, True]
    assert live_blocks(rows, fixed, PROMPTS).routed.tolist() == [True, False]
