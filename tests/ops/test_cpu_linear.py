"""A matrix in panels against plain arithmetic: every instruction set of this machine, forced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor
from torch.nn import functional as F

from coterie import ops
from coterie.ops import cpu, reference
from coterie.ops.cpu.library import SiluMulArgs
from coterie.ops.cpu.op_chain import run_ops
from coterie.quantization import FORMATS, QTensor, QuantFormat, dequantize, quantize
from coterie.values import Matrix, PackedMatrix

HALF, FULL = torch.bfloat16, torch.float32
INT8 = FORMATS["int8"]
NEAR = {HALF: 4e-3, FULL: 1e-5}
"""By the dtype of the output: of its norm."""

if not cpu.is_available():
    pytest.skip("NOT TESTED: the kernels for CPUs are not built", allow_module_level=True)

ISAS = cpu.available_isas()
DTYPES = st.sampled_from((HALF, FULL))


@given(
    seed=st.integers(0, 999),
    isa=st.sampled_from(ISAS),
    tokens=st.integers(1, 70),
    k=st.integers(1, 200),
    rows=st.integers(1, 200),
    threads=st.integers(1, 3),
    kinds=st.tuples(DTYPES, DTYPES, DTYPES),
)
@law(200)
def test_linear_equals_plain_torch(
    *,
    seed: int,
    isa: str,
    tokens: int,
    k: int,
    rows: int,
    threads: int,
    kinds: tuple[torch.dtype, torch.dtype, torch.dtype],
):
    x, weight = drawn(tokens, k, kinds[0], seed), drawn(rows, k, kinds[1], seed + 1)
    assert error(x, weight, kinds[2], isa, threads) < NEAR[kinds[2]]


@given(
    seed=st.integers(0, 999),
    isa=st.sampled_from(ISAS),
    tokens=st.integers(1, 40),
    k=st.integers(1, 200),
    rows=st.integers(1, 120),
    kinds=st.tuples(DTYPES, DTYPES),
)
@law(100)
def test_linear_in_8_bits_equals_the_reference(
    *, seed: int, isa: str, tokens: int, k: int, rows: int, kinds: tuple[torch.dtype, torch.dtype]
):
    x, weight = drawn(tokens, k, kinds[0], seed), quantize(drawn(rows, k, FULL, seed + 1), INT8)
    packed = ops.prepare_matrix(weight)
    assert isinstance(packed, PackedMatrix)
    assert packed.nbytes < 1.05 * weight.nbytes * (rows + 31) * (k + 63) / (rows * k)
    rounded = reference.round_activations(x)
    expected = ops.linear(rounded, weight, dtype=FULL)
    found = product(x, packed, kinds[1], isa)
    assert found.dtype == kinds[1]
    assert float((found.float() - expected).norm()) <= NEAR[kinds[1]] * float(
        (rounded.abs() @ dequantize(weight).abs().T).norm()
    )
    exact = ops.linear(x, weight, dtype=FULL)
    assert float((found.float() - exact).norm()) <= 2e-2 * float(x.float().norm()) * float(
        dequantize(weight).norm()
    )


@given(
    seed=st.integers(0, 999),
    isa=st.sampled_from(ISAS),
    tokens=st.integers(0, 40),
    hidden=st.integers(1, 150),
    width=st.integers(1, 100),
    beside=st.booleans(),
    threads=st.integers(1, 3),
)
@law(100)
def test_swiglu_equals_plain_torch(
    *, seed: int, isa: str, tokens: int, hidden: int, width: int, beside: bool, threads: int
):
    x = drawn(tokens, hidden, HALF, seed)
    gate_up = drawn(2 * width, hidden, HALF, seed + 1) * hidden**-0.5
    down = drawn(hidden, width, HALF, seed + 2) * width**-0.5
    more = drawn(tokens, hidden, FULL, seed + 3) if beside else None
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=1)
    expected = (F.silu(gate) * up) @ down.double().T
    expected = expected if more is None else expected + more.double()
    packed = (ops.prepare_matrix(gate_up), ops.prepare_matrix(down))
    with forced(isa, threads):
        found = ops.gated_mlp(x, *packed, more)
    assert found.dtype == HALF
    # The activation and the sum are rounded to bf16 several times; the two terms may cancel.
    size = float(expected.norm()) + (0.0 if more is None else float(more.double().norm()))
    assert float((found.double() - expected).norm()) <= 2e-2 * size


def test_swiglu_of_rows_is_the_same():
    x, gate_up, down = drawn(5, 40, HALF), drawn(60, 40, HALF, 1), drawn(40, 30, HALF, 2)
    more = drawn(5, 40, FULL, 3)
    plain = ops.linear(ops.activate_and_mul(ops.linear(x, gate_up), "silu"), down)
    assert torch.equal(ops.gated_mlp(x, gate_up, down), plain)
    assert torch.equal(ops.gated_mlp(x, gate_up, down, more), more.to(HALF) + plain)
    packed = (ops.prepare_matrix(gate_up), ops.prepare_matrix(down))
    found = ops.gated_mlp(x, *packed, more)
    assert torch.allclose(found, more.to(HALF) + plain, rtol=0.05, atol=0.5)
    with pytest.raises(ValueError, match="residual"):
        ops.gated_mlp(x, *packed, more[:4])
    with pytest.raises(ValueError, match=r"gate_up .* does not match down"):
        ops.gated_mlp(x, packed[0], packed[0])


def test_too_many_operations_raise():
    x, out = drawn(2, 8, HALF), torch.empty(2, 4, dtype=HALF)
    work = SiluMulArgs(x.data_ptr(), out.data_ptr(), 2, 4)
    run_ops(*[work] * 8)
    assert torch.allclose(out.float(), ops.activate_and_mul(x, "silu").float(), rtol=2**-6)
    with pytest.raises(RuntimeError, match="too many operations"):
        run_ops(*[work] * 9)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 13, 32, 512])
def test_published_sizes(isa: str, tokens: int):
    assert error(drawn(tokens, 2048, HALF), drawn(48, 2048, HALF), FULL, isa) < NEAR[FULL]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [HALF, torch.int8])
def test_threads_do_not_change_a_bit(isa: str, kind: torch.dtype):
    x, packed = drawn(33, 150, HALF), ops.prepare_matrix(stored(drawn(170, 150, HALF), kind))
    first = product(x, packed, FULL, isa, threads=1)
    assert all(torch.equal(product(x, packed, FULL, isa, threads=n), first) for n in (2, 3, 7))


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("kind", [HALF, FULL, torch.int8])
def test_a_token_does_not_depend_on_its_batch(dtype: torch.dtype, kind: torch.dtype):
    x, packed = drawn(40, 90, dtype), ops.prepare_matrix(stored(drawn(70, 90, FULL), kind))
    together = product(x, packed, FULL)
    assert all(torch.equal(product(x[i : i + 1], packed, FULL)[0], together[i]) for i in range(40))


def test_sums_are_rounded_to_nearest_even():
    x = torch.tensor([[1.0, 2.0**-9], [1.0, 2.0**-9 + 2.0**-17], [1.0, 3 * 2.0**-9]])
    packed = ops.prepare_matrix(torch.ones(1, 2))
    for isa in ISAS:
        found = product(x, packed, HALF, isa)
        assert torch.equal(found, x.sum(dim=1, keepdim=True).to(HALF))


def test_nan_propagates():
    x, packed = drawn(3, 40, HALF), ops.prepare_matrix(drawn(50, 40, HALF))
    x[1, 7] = torch.nan
    for isa in ISAS:
        for dtype in (HALF, FULL):
            found = product(x, packed, dtype, isa)
            assert found[1].isnan().all()
            assert found[::2].isfinite().all()


def test_shapes_are_kept():
    packed = ops.prepare_matrix(drawn(50, 40, HALF))
    assert ops.linear(drawn(6, 40, HALF).view(2, 3, 40), packed).shape == (2, 3, 50)
    assert ops.linear(torch.zeros(0, 40), packed).shape == (0, 50)
    with pytest.raises(ValueError, match="tokens have 41 features, the matrix 40 columns"):
        ops.linear(torch.zeros(2, 41), packed)


def test_rows_multiply_in_their_own_precision():
    x, weight = drawn(4, 30, HALF), drawn(5, 30, FULL)
    assert torch.equal(ops.linear(x, weight, dtype=FULL), x.float() @ weight.T)
    assert ops.linear(x, weight).dtype == HALF


def test_a_released_source_gives_the_same_packing():
    for kind in (HALF, torch.int8):
        weight = drawn(9000, 64, HALF)
        kept = ops.prepare_matrix(stored(weight, kind))
        spent = ops.prepare_matrix(stored(weight.clone(), kind), release_source=True)
        assert isinstance(kept, PackedMatrix)
        assert isinstance(spent, PackedMatrix)
        assert torch.equal(kept.packed, spent.packed)


def test_other_formats_are_not_packed():
    weight = torch.zeros(3, 4, dtype=torch.float16)
    assert ops.prepare_matrix(weight) is weight
    for form in (FORMATS["int4"], QuantFormat(8, 32)):
        quantized = quantize(drawn(3, 40, FULL), form)
        assert ops.prepare_matrix(quantized) is quantized
        expected = dequantize(quantized).sum(dim=1)[None]
        assert torch.allclose(ops.linear(torch.ones(1, 40), quantized), expected, atol=1e-4)


def stored(weight: Tensor, kind: torch.dtype) -> Tensor | QTensor:
    return quantize(weight, INT8) if kind is torch.int8 else weight.to(kind)


def drawn(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(
    x: Tensor, packed: Matrix, dtype: torch.dtype, isa: str = ISAS[-1], threads: int = 2
) -> Tensor:
    with forced(isa, threads):
        return ops.linear(x, packed, dtype=dtype)


@contextmanager
def forced(isa: str, threads: int) -> Iterator[None]:
    before, found = torch.get_num_threads(), os.environ.get("COTERIE_ISA")
    torch.set_num_threads(threads)
    os.environ["COTERIE_ISA"] = isa
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("COTERIE_ISA")
        if found is not None:
            os.environ["COTERIE_ISA"] = found


def error(x: Tensor, weight: Tensor, dtype: torch.dtype, isa: str, threads: int = 2) -> float:
    """Of the product, in units of what adds up to it; tokens rounded as the kernel does."""
    rounds = weight.dtype == HALF and isa == "avx512bf16"
    wide = (x.to(HALF) if rounds else x).double()
    expected, size = wide @ weight.double().T, wide.abs() @ weight.double().abs().T
    found = product(x, ops.prepare_matrix(weight), dtype, isa, threads).double()
    return float((found - expected).norm() / size.norm())
