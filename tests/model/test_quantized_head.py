"""A head in 8 bits against the head as it was: its best tokens, also where rows nearly tie."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie import ops
from coterie.model.quantized_head import BLOCK, QuantizedHead
from coterie.ops import cpu
from coterie.quantization import FORMATS, quantize

HALF, FULL = torch.bfloat16, torch.float32
ISAS: Sequence[str | None] = cpu.available_isas() if cpu.is_available() else [None]


SIZES = {
    "seed": st.integers(0, 9999),
    "tokens": st.integers(1, 40),
    "hidden": st.integers(1, 150),
    "vocabulary": st.integers(2, 500),
    "spread": st.sampled_from((0.0, 1e-3, 1e-2, 1.0)),
    "isa": st.sampled_from(ISAS),
}


@given(**SIZES)
@law(300)
def test_the_best_tokens_are_those_of_the_plain_head(
    *, seed: int, tokens: int, hidden: int, vocabulary: int, spread: float, isa: str | None
):
    if isa is None:
        pytest.skip("NOT TESTED: the kernels for CPUs are not built")
    rows, x = near_ties(vocabulary, hidden, spread, seed), drawn(tokens, hidden, seed + 1)
    excluded = seed % vocabulary
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_ISA", isa)
        plain, logits = ops.linear(x, ops.prepare_matrix(rows), dtype=FULL), head_of(rows)(x)
    expected, found = (ops.summarize_logits(each, excluded) for each in (plain, logits))
    assert torch.equal(found.argmax, expected.argmax)
    assert torch.equal(found.unmasked_argmax, expected.unmasked_argmax)
    for best in (found.argmax, found.unmasked_argmax):
        assert torch.equal(logits.gather(1, best[:, None]), plain.gather(1, best[:, None]))


@given(**SIZES, dtype=st.sampled_from((HALF, FULL)))
@law(200)
def test_no_logit_errs_by_more_than_its_bound(
    *,
    seed: int,
    tokens: int,
    hidden: int,
    vocabulary: int,
    spread: float,
    isa: str | None,
    dtype: torch.dtype,
):
    rows = near_ties(vocabulary, hidden, spread, seed).to(dtype)
    x, head = drawn(tokens, hidden, seed + 1).to(dtype), head_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        if isa is not None:
            patch.setenv("COTERIE_ISA", isa)
        logits = ops.linear(x, head.quantized, dtype=FULL)
    error = (logits.double() - x.double() @ rows.double().T).abs()
    bound = head.bound(x).repeat_interleave(BLOCK, dim=1)[:, :vocabulary]
    assert bool((error <= bound).all())


def test_in_fp32_the_best_token_is_that_of_the_plain_head():
    rows, x = near_ties(1000, 64, 1e-3, 0).float(), drawn(50, 64, 1).float()
    plain, logits = x @ rows.T, head_of(rows)(x)
    best = logits.argmax(dim=1, keepdim=True)
    torch.testing.assert_close(plain.gather(1, best), plain.amax(dim=1, keepdim=True))


def test_few_rows_are_candidates_and_the_other_logits_are_near():
    rows, x = drawn(8000, 512, 0), drawn(4, 512, 1)
    head = head_of(rows)
    plain, logits = ops.linear(x, ops.prepare_matrix(rows), dtype=FULL), head(x)
    assert int((logits == plain).any(dim=0).sum()) < len(rows) / 50
    assert float((logits - plain).norm() / plain.norm()) < 0.02


def test_logits_that_are_not_finite_stay():
    x = drawn(3, 64, 1)
    x[1, 5] = torch.nan
    logits = head_of(drawn(300, 64, 0))(x)
    assert bool(logits[1].isnan().all())
    assert bool(logits[::2].isfinite().all())


def head_of(rows: Tensor) -> QuantizedHead:
    return QuantizedHead.of(rows, quantize(rows, FORMATS["int8"]))


def drawn(rows: int, k: int, seed: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(HALF)


def near_ties(rows: int, k: int, spread: float, seed: int) -> Tensor:
    """Rows that differ by ``spread`` from one of three directions, and some that are equal."""
    directions = drawn(3, k, seed).float()[torch.arange(rows) % 3]
    noise = drawn(rows, k, seed + 7).float() * spread
    weight = (directions + noise).to(HALF)
    weight[rows // 2] = weight[0]
    return weight
