"""Experts as runs of bytes: what is put in comes out, and kernels read it where it lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from test_triton_experts import DEVICE, agree, inputs, layer, routed
from torch import Tensor

from coterie import ops
from coterie.ops import reference
from coterie.ops.expert_layout import ALIGNMENT, ExpertLayout
from coterie.quantization import FORMATS, QTensor, QuantFormat
from coterie.values import Slab

BF16, FP32 = torch.bfloat16, torch.float32
KEPT = (FP32, BF16, torch.float16, FORMATS["int8"], FORMATS["int4"], QuantFormat(4, 16))


def parts(slab: Slab) -> list[Tensor]:
    found: list[Tensor] = []
    for weight in (slab.gate_up, slab.down):
        if isinstance(weight, QTensor):
            found += [weight.q, weight.scales]
        elif isinstance(weight, Tensor):
            found.append(weight)
    return found


def in_blobs(slab: Slab, kept: torch.dtype | QuantFormat) -> tuple[ExpertLayout, Tensor, Slab]:
    """The same experts in blobs: their layout, their memory, and a slab over it."""
    slots, hidden, width = slab.down.shape
    layout = ExpertLayout(hidden, width, kept)
    memory = torch.full((slots, layout.size), 255, dtype=torch.uint8, device=slab.slot_of.device)
    layout.fill(memory, slab)
    return layout, memory, layout.as_slab(memory, slab.slot_of)


def made(
    kept: torch.dtype | QuantFormat, sizes: tuple[int, int], seed: int, experts: int = 6
) -> Slab:
    form = kept if isinstance(kept, QuantFormat) else None
    return layer(experts, sizes, FP32 if isinstance(kept, QuantFormat) else kept, form, seed)


@given(
    kept=st.sampled_from(KEPT),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 24)),
    seed=st.integers(0, 2**31),
)
@law(60)
def test_a_filled_layout_equals_its_slab(
    kept: torch.dtype | QuantFormat, sizes: tuple[int, int], seed: int
) -> None:
    slab = made(kept, sizes, seed)
    layout, memory, found = in_blobs(slab, kept)
    assert layout.size % ALIGNMENT == 0
    starts = [part.start for part in layout.spans.values()]
    ends = [part.stop for part in layout.spans.values()]
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    first, last = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    for one, other in zip(parts(found), parts(slab), strict=True):
        assert torch.equal(one, other)
        assert first <= one.data_ptr() < last  # nothing was copied


def test_sizes_of_a_published_model() -> None:
    sizes = {kept: ExpertLayout(2048, 512, kept).size for kept in (BF16, *FORMATS.values())}
    assert list(sizes.values()) == [6_291_456, 3_244_032, 1_769_472]


def test_other_weights_are_refused() -> None:
    slab = made(BF16, (32, 16), 1)
    memory = torch.empty(len(slab.down), 8192, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit a layout of int8"):
        ExpertLayout(32, 16, FORMATS["int8"]).fill(memory, slab)


@pytest.mark.parametrize(
    ("kept", "sizes"),
    [
        *((kept, (33, 17)) for kept in KEPT),
        pytest.param(BF16, (64, 32), marks=pytest.mark.slow),
        (KEPT[-1], (64, 32)),
    ],
)
def test_kernels_read_the_layout_in_place(
    kept: torch.dtype | QuantFormat, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the reference, bit for bit as over weights without gaps, and nothing is copied."""
    from coterie.ops.triton import experts

    slab = made(kept, sizes, 3, experts=4)
    _, _, apart = in_blobs(slab, kept)
    dtype = BF16 if isinstance(kept, QuantFormat) else kept
    x, routing = inputs(3, sizes[0], dtype, 3), routed(3, 2, 4, 4, 3)
    together = experts.run_experts(x, routing, slab)
    agree(x, routing, apart)
    make, weights = Tensor.contiguous, {part.data_ptr() for part in parts(apart)}

    def contiguous(one: Tensor) -> Tensor:
        assert one.data_ptr() not in weights
        return make(one)

    monkeypatch.setattr(Tensor, "contiguous", contiguous)
    assert torch.equal(experts.run_experts(x, routing, apart), together)


@pytest.mark.parametrize("kept", [BF16, FORMATS["int8"], FORMATS["int4"]])
def test_slots_of_a_larger_cache_hold_their_experts(kept: torch.dtype | QuantFormat) -> None:
    """Few of many slots, as a store has them: the others are other bytes."""
    from coterie.ops.triton import experts

    slab = made(kept, (64, 32), 4, experts=12)
    layout, memory, _ = in_blobs(slab, kept)
    some = [5, 2, 7]
    slot_of = torch.full_like(slab.slot_of, -1)
    held = [int((slab.slot_of == slot).nonzero()) for slot in some]
    more = torch.full((9, layout.size), 170, dtype=torch.uint8, device=DEVICE)
    for at, (slot, expert) in enumerate(zip(some, held, strict=True)):
        more[8 - 2 * at] = memory[slot]
        slot_of[expert] = 8 - 2 * at
    only = torch.where(slot_of >= 0, slab.slot_of, -1)
    x, routing = inputs(7, 64, BF16, 4), routed(7, 3, 12, 12, 4)
    found = experts.run_experts(x, routing, layout.as_slab(more, slot_of))
    true = experts.run_experts(x, routing, Slab(slab.gate_up, slab.down, only))
    assert torch.equal(found, true)


@pytest.mark.skipif(DEVICE == "cuda", reason="of what a CPU does without kernels of its own")
@pytest.mark.parametrize("kept", KEPT)
def test_a_cpu_computes_over_the_layout(kept: torch.dtype | QuantFormat) -> None:
    slab = made(kept, (64, 32), 5)
    _, _, apart = in_blobs(slab, kept)
    dtype = FP32 if isinstance(kept, QuantFormat) else kept
    x, routing = inputs(5, 64, dtype, 5), routed(5, 2, 6, 6, 5)
    true = reference.run_experts(x, routing, slab)
    found = ops.run_experts(x, routing, apart)
    torch.testing.assert_close(found, true, rtol=2e-2, atol=2e-2)
