"""Lists of tokens by expert from a kernel: what plain torch lists, in one launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.ops import reference
from coterie.values import Routing, expert_mask

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def routings(draw: st.DrawFn, *, most: int = 40) -> tuple[Routing, torch.Tensor, int]:
    """Any ids, some of them -1; a slab that holds some experts, in any order."""
    experts = draw(st.sampled_from((1, 3, 8, 64, 96, 256)))
    tokens, k = draw(st.integers(1, most)), draw(st.integers(1, min(8, experts)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    favoured = torch.rand(experts, generator=generator) ** draw(st.sampled_from((1, 8)))
    order = (torch.rand(tokens, experts, generator=generator) * favoured).argsort(-1)
    ids = order[:, -k:].flip(-1)
    lost = draw(st.sampled_from((0, 0.3, 1)))
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < lost, -1)
    held = torch.randperm(experts, generator=generator)[: draw(st.integers(0, experts))]
    slot_of = torch.full((experts,), -1).scatter_(0, held, torch.arange(len(held)))
    weights = torch.rand(ids.shape, generator=generator)
    used = expert_mask(ids.flatten(), experts)
    routing = Routing(*(x.to(DEVICE) for x in (ids, weights, used, ids)))
    return routing, slot_of.to(DEVICE), len(held)


@settings(max_examples=10)
@given(routings())
def test_a_kernel_lists_what_torch_lists(drawn: tuple[Routing, torch.Tensor, int]) -> None:
    agree(*drawn)


@pytest.mark.slow
@settings(max_examples=30)
@given(routings(most=512))
def test_a_kernel_lists_many_tokens_too(drawn: tuple[Routing, torch.Tensor, int]) -> None:
    agree(*drawn)


@given(routings())
def test_every_pair_is_listed_once_by_slot_and_token(
    drawn: tuple[Routing, torch.Tensor, int],
) -> None:
    routing, slot_of, slots = drawn
    found = reference.dispatch(routing, slot_of, slots)
    expected = sorted(
        (int(slot_of[expert]), place)
        for place, expert in enumerate(routing.topk_ids.flatten().tolist())
        if expert >= 0 and slot_of[expert] >= 0
    )
    assert [place for _, place in expected] == found.pair_ids[: len(expected)].tolist()
    assert bool((found.pair_ids[len(expected) :] == -1).all())
    assert [
        slot
        for slot in range(slots)
        for _ in range(int(found.slot_begin[slot + 1] - found.slot_begin[slot]))
    ] == [slot for slot, _ in expected]
    busy = sorted({slot for slot, _ in expected})
    assert found.active_slots.tolist() == busy + [-1] * (slots - len(busy))
    k = routing.topk_ids.shape[-1]
    assert found.token_ids.tolist() == [
        pair // k if pair >= 0 else -1 for pair in found.pair_ids.tolist()
    ]


def agree(routing: Routing, slot_of: torch.Tensor, slots: int) -> None:
    from coterie.ops.triton import dispatch

    found = dispatch(routing, slot_of, slots)
    expected = reference.dispatch(routing, slot_of, slots)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name
