"""Norms and surveys of rows by kernels against plain torch: every instruction set, forced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie import ops
from coterie.ops import cpu, reference

if not cpu.is_available():
    pytest.skip("NOT TESTED: the kernels for CPUs are not built", allow_module_level=True)

ISAS = cpu.available_isas()


@given(
    seed=st.integers(0, 999),
    isa=st.sampled_from(ISAS),
    rows=st.integers(1, 40),
    width=st.integers(1, 150),
    size=st.sampled_from((1e-3, 1.0, 1e3)),
)
@law(100)
def test_rms_norm_equals_plain_torch(*, seed: int, isa: str, rows: int, width: int, size: float):
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=draw) * size).bfloat16()
    weight = torch.randn(width, generator=draw).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_ISA", isa)
        found = ops.rms_norm(x, weight, 1e-6)
    # The mean may differ in its last bit, and then what is rounded after it.
    assert torch.allclose(found.float(), reference.rms_norm(x, weight, 1e-6).float(), rtol=2**-6)


@given(
    seed=st.integers(0, 999),
    isa=st.sampled_from(ISAS),
    rows=st.integers(0, 40),
    width=st.integers(1, 150),
)
@law(60)
def test_add_rms_norm_equals_plain_torch(*, seed: int, isa: str, rows: int, width: int):
    draw = torch.Generator().manual_seed(seed)
    x, more = torch.randn(2, rows, width, generator=draw).bfloat16()
    weight = torch.randn(width, generator=draw).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_ISA", isa)
        total, found = ops.add_rms_norm(x, more, weight, 1e-6)
    assert torch.equal(total, x + more)
    expected = reference.rms_norm(total, weight, 1e-6)
    assert torch.allclose(found.float(), expected.float(), rtol=2**-6)


def test_add_rms_norm_of_mixed_dtypes():
    x, more, weight = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
    total, found = ops.add_rms_norm(x, more, weight, 1e-6)
    assert torch.equal(total, x + more)
    assert torch.equal(found, reference.rms_norm(total, weight, 1e-6))
    half = more.bfloat16().T.contiguous().T
    total, _ = ops.add_rms_norm(x.bfloat16(), half, weight.bfloat16(), 1e-6)
    assert torch.equal(total, x.bfloat16() + half)


def test_rms_norm_keeps_shapes_and_dtypes():
    x, weight = torch.randn(2, 3, 5), torch.randn(5)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    half = x.bfloat16().transpose(0, 1)
    expected = reference.rms_norm(half, weight.bfloat16(), 1e-6)
    assert torch.allclose(ops.rms_norm(half, weight.bfloat16(), 1e-6), expected)
    assert ops.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6).shape == (2, 3, 5)


@given(
    seed=st.integers(0, 999),
    isa=st.sampled_from(ISAS),
    rows=st.integers(0, 5),
    width=st.integers(2, 120),
    levels=st.integers(1, 40),
    data=st.data(),
)
@law(200)
def test_logits_summary_equals_plain_torch(
    *, seed: int, isa: str, rows: int, width: int, levels: int, data: st.DataObject
):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (rows, width), generator=draw) * 1.25 - 9  # many are equal
    mask = data.draw(st.integers(0, width - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_ISA", isa)
        found = ops.summarize_logits(logits, mask)
    expected = reference.summarize_logits(logits, mask)
    assert torch.equal(found.argmax, expected.argmax)
    assert torch.equal(found.unmasked_argmax, expected.unmasked_argmax)
    assert torch.allclose(found.logsumexp, expected.logsumexp, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_a_whole_vocabulary(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COTERIE_ISA", isa)
    logits = torch.randn(4, 157_184, generator=torch.Generator().manual_seed(0)) * 4
    logits[0, 156_895] = logits[1, 0] = logits[2, 157_183] = 30.0
    found = ops.summarize_logits(logits, 156_895)
    expected = reference.summarize_logits(logits, 156_895)
    assert torch.equal(found.argmax, expected.argmax)
    assert torch.equal(found.unmasked_argmax, expected.unmasked_argmax)
    assert torch.allclose(found.logsumexp, expected.logsumexp, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_logits_make_logsumexp_non_finite(
    bad: float, isa: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COTERIE_ISA", isa)
    logits: Tensor = torch.zeros(3, 50)
    logits[1, 17] = bad
    logits[2] = torch.nan
    assert ops.summarize_logits(logits, 3).logsumexp.isfinite().tolist() == [True, False, False]
    logits = torch.full((1, 40), -torch.inf)
    logits[0, 39] = 2.0
    found = ops.summarize_logits(logits, 3)
    assert found.argmax.tolist() == [39]
    assert torch.allclose(found.logsumexp, torch.tensor([2.0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e19, 1e25, 3e38])
def test_a_row_whose_square_overflows_becomes_nan(
    size: float, isa: str, monkeypatch: pytest.MonkeyPatch
):
    """Its inverse is 0, which would make an answer of zeros."""
    monkeypatch.setenv("COTERIE_ISA", isa)
    x = torch.full((2, 40), size)
    x[1] = 1.0
    for dtype in (torch.bfloat16, torch.float32):
        found = ops.rms_norm(x.to(dtype), torch.ones(40, dtype=dtype), 1e-6)
        assert found.isfinite().all(dim=1).tolist() == [False, True]
