"""Reference operations against the plainest possible second writing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie import ops
from coterie.ops import grouped_gemm, reference
from coterie.routing import parse_policy, route
from coterie.values import Activation, RouterSpec, Routing, Scores, Slab, expert_mask

POLICIES = ("vanilla", "des-vote:beta=0.1", "topk:k=1", "naee:beta=0.5", "random:beta=0.2")

numbers = st.lists(st.integers(-3, 3), min_size=1, max_size=40)


@given(numbers, st.integers(0, 45))
@law(150)
def test_top_ids_are_sorted_with_ties_to_the_lower_index(key: list[int], k: int):
    expected = sorted(range(len(key)), key=lambda i: (-key[i], i))[:k]
    for dtype in (torch.float32, torch.int64, torch.float64):
        assert ops.top_ids(torch.tensor(key, dtype=dtype), k).tolist() == expected
        mask = ops.top_mask(torch.tensor(key, dtype=dtype), k)
        assert mask.nonzero().flatten().tolist() == sorted(expected)


@given(numbers, st.data())
@law(150)
def test_a_lower_tier_comes_first_whatever_its_key(key: list[int], data: st.DataObject):
    tier = data.draw(st.lists(st.integers(0, 2), min_size=len(key), max_size=len(key)))
    expected = sorted(range(len(key)), key=lambda i: (tier[i], -key[i], i))
    found = ops.top_ids(torch.tensor(key).float(), len(key), tier=torch.tensor(tier))
    assert found.tolist() == expected


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=40))
@law(200)
def test_every_float_sorts_where_it_belongs(key: list[float]):
    expected = sorted(range(len(key)), key=lambda i: (-key[i], i))
    assert ops.top_ids(torch.tensor(key), len(key)).tolist() == expected


def test_zero_is_one_number_whatever_its_sign():
    assert ops.top_ids(torch.tensor([-0.0, 0.0, -0.0, -1e-45]), 4).tolist() == [0, 1, 2, 3]


def test_expert_mask_ignores_empty_ids():
    assert expert_mask(torch.tensor([[2, -1], [-1, -1]]), 3).tolist() == [
        [False, False, True],
        [False, False, False],
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_experts_weigh_and_add(policy: str):
    x, routing, slab = layer(policy)
    expected = _each_token_by_itself(x, routing, slab)
    torch.testing.assert_close(reference.run_experts(x, routing, slab), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    seed=st.integers(0, 2**31),
    parts=st.integers(1, 5),
    policy=st.sampled_from(POLICIES),
    activation=st.sampled_from(sorted(reference.ACTIVATIONS)),
)
@law(40)
def test_the_grouped_product_equals_the_loop(
    dtype: torch.dtype, seed: int, parts: int, policy: str, activation: Activation
):
    x, routing, whole = layer(policy, seed, hidden=8, width=16)
    whole = Slab(whole.gate_up.to(dtype), whole.down.to(dtype), whole.slot_of)
    for slab in split(whole, parts):
        assert grouped_gemm.supports(x.to(dtype), slab)
        torch.testing.assert_close(
            grouped_gemm.run_experts(x.to(dtype), routing, slab, activation),
            reference.run_experts(x.to(dtype), routing, slab, activation),
        )


def test_shapes_that_the_grouped_product_cannot_take_go_through_the_loop():
    x, routing, slab = layer("vanilla")
    assert not grouped_gemm.supports(x, slab)
    assert not grouped_gemm.supports(x, Slab(slab.gate_up[:0], slab.down[:0], slab.slot_of))
    assert torch.equal(ops.run_experts(x, routing, slab), reference.run_experts(x, routing, slab))


@given(st.integers(0, 2**31), st.integers(1, 4))
@law(30)
def test_slabs_of_a_layer_add_up_to_it(seed: int, parts: int):
    x, routing, whole = layer("vanilla", seed)
    total = sum(ops.run_experts(x, routing, slab) for slab in split(whole, parts))
    torch.testing.assert_close(total, ops.run_experts(x, routing, whole))


@pytest.mark.parametrize("hidden", [5, 8])
def test_an_unused_expert_is_never_read(hidden: int):
    x, routing, slab = layer("des-vote:beta=0.25", hidden=hidden, width=8)
    expected = ops.run_experts(x, routing, slab)
    slab.gate_up[~routing.used] = torch.nan
    slab.down[~routing.used] = torch.nan
    assert torch.equal(ops.run_experts(x, routing, slab), expected)


def test_no_experts_give_zeros():
    x, routing, slab = layer("vanilla")
    absent = Slab(slab.gate_up[:0], slab.down[:0], torch.full_like(slab.slot_of, -1))
    assert torch.equal(ops.run_experts(x, routing, absent), torch.zeros(x.shape))


def test_half_precision_adds_in_full():
    x, routing, slab = layer("vanilla")
    half = Slab(slab.gate_up.bfloat16(), slab.down.bfloat16(), slab.slot_of)
    out = ops.run_experts(x.bfloat16(), routing, half)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, ops.run_experts(x, routing, slab), atol=0.05, rtol=0.05)


def layer(
    policy: str, seed: int = 0, *, hidden: int = 5, width: int = 6
) -> tuple[Tensor, Routing, Slab]:
    """Ten tokens and a slab of 16 experts; these sizes keep the grouped product out."""
    generator = torch.Generator().manual_seed(seed)
    router = RouterSpec(16, 4, "sigmoid", True, scale=2.5, groups=4, topk_groups=2)
    scores = Scores(torch.randn(2, 5, 16, generator=generator), router)
    slab = Slab(
        gate_up=torch.randn(16, 2 * width, hidden, generator=generator),
        down=torch.randn(16, hidden, width, generator=generator),
        slot_of=torch.arange(16),
    )
    return torch.randn(10, hidden, generator=generator), route(scores, parse_policy(policy)), slab


def split(slab: Slab, parts: int) -> list[Slab]:
    """The same experts in several slabs, each in a shuffled order."""
    slabs = []
    for part in range(parts):
        experts = torch.arange(16)[part::parts].flip(0)
        slot_of = torch.full((16,), -1).scatter(0, experts, torch.arange(len(experts)))
        slabs.append(Slab(slab.gate_up[experts], slab.down[experts], slot_of))
    return slabs


def _each_token_by_itself(x: Tensor, routing: Routing, slab: Slab) -> Tensor:
    out = torch.zeros(x.shape)
    for token, (ids, weights) in enumerate(
        zip(routing.topk_ids, routing.topk_weights, strict=True)
    ):
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            if expert >= 0:
                both = slab.gate_up[slab.slot_of[expert]] @ x[token]
                gate, up = both[:6], both[6:]
                inner = gate * torch.sigmoid(gate) * up
                out[token] += weight * (slab.down[slab.slot_of[expert]] @ inner)
    return out
