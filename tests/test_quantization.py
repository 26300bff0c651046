"""Quantized weights: laws of integers and scales, and the error of an expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from coterie import ops
from coterie.errors import CoterieError
from coterie.ops import reference
from coterie.quantization import (
    MIN_GROUP_MAX,
    QTensor,
    QuantFormat,
    dequantize,
    parse_format,
    quantize,
)
from coterie.values import Routing, Slab

formats = st.builds(QuantFormat, st.sampled_from([4, 8]), st.sampled_from([8, 32, 64]))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Rows of any length, some of them outliers, some groups zero, of any magnitude."""
    rows, k = draw(st.integers(1, 4)), draw(st.integers(1, 150))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weight = torch.randn(rows, k, generator=noise)
    kind = draw(st.sampled_from(["plain", "outliers", "holes", "whole numbers", "ties"]))
    if kind == "outliers":
        weight = weight**5
    if kind == "holes":
        weight[:, draw(st.integers(0, k - 1)) :] = 0
    if kind == "whole numbers":
        weight = weight.mul(4).round()
    if kind == "ties":
        weight = weight.sign()
    return weight * 10.0 ** draw(st.integers(-20, 20))


def grouped(weight: Tensor, fmt: QuantFormat) -> Tensor:
    """[rows, groups, group], zeros at the end."""
    return F.pad(weight, (0, -weight.shape[-1] % fmt.group)).unflatten(-1, (-1, fmt.group))


def absmax_quantized(weight: Tensor, fmt: QuantFormat) -> Tensor:
    """The weight after rounding with a symmetric scale of the largest weight."""
    x, top = grouped(weight, fmt), -fmt.qmin - 1
    scale = (x.abs().amax(-1, keepdim=True) / top).bfloat16().float()
    numbers = (x / scale.where(scale > 0, 1.0)).round().clamp(fmt.qmin, top)
    return (numbers * scale).flatten(-2)[..., : weight.shape[-1]]


@given(weights(), formats)
def test_quantizing_is_idempotent(weight: Tensor, fmt: QuantFormat) -> None:
    once = dequantize(quantize(weight, fmt))
    assert dequantize(quantize(once, fmt)).equal(once)


@given(weights(), formats)
def test_a_mirrored_weight_is_mirrored(weight: Tensor, fmt: QuantFormat) -> None:
    plain, mirrored = quantize(weight, fmt), quantize(-weight, fmt)
    assert dequantize(plain).equal(-dequantize(mirrored))
    assert plain.int_values().equal(mirrored.int_values())


@given(weights(), formats, st.integers(-30, 30))
def test_a_power_of_two_goes_into_the_scales(weight: Tensor, fmt: QuantFormat, power: int) -> None:
    small, large = quantize(weight, fmt), quantize(weight * 2.0**power, fmt)
    assert small.q.equal(large.q)
    assert (small.scales.float() * 2.0**power).equal(large.scales.float())


@given(weights(), formats)
def test_no_group_is_worse_than_absmax_quantization(weight: Tensor, fmt: QuantFormat) -> None:
    def error(values: Tensor) -> Tensor:
        unit = grouped(weight, fmt).abs().amax(-1).double().clamp(min=1e-300)
        return (grouped(values - weight, fmt).double() / unit[..., None]).square().sum(-1)

    ours = error(dequantize(quantize(weight, fmt)))
    assert bool((ours <= error(absmax_quantized(weight, fmt)) * (1 + 1e-4) + 1e-12).all())


@given(weights(), formats)
def test_errors_are_bounded_by_the_group(weight: Tensor, fmt: QuantFormat) -> None:
    """By half a step, or by the part of the largest weight that the scale search cuts off."""
    quantized = quantize(weight, fmt)
    most = grouped(weight, fmt).abs().amax(-1, keepdim=True)
    off = grouped(dequantize(quantized) - weight, fmt).abs()
    step = most / (-fmt.qmin - 1)
    cut = most * (0.3 if fmt.bits == 4 else 0.09)
    assert bool((off <= torch.maximum(0.51 * step, cut)).all())


@given(weights(), formats)
def test_a_group_of_zeros_is_zeros(weight: Tensor, fmt: QuantFormat) -> None:
    zeros = quantize(torch.zeros_like(weight), fmt)
    assert not dequantize(zeros).any()
    assert not zeros.scales.any()
    assert not zeros.int_values().any()


@given(weights(), formats)
def test_rows_are_independent(weight: Tensor, fmt: QuantFormat) -> None:
    whole = quantize(weight, fmt)
    for row in range(len(weight)):
        alone = quantize(weight[row : row + 1], fmt)
        assert alone.q.equal(whole.q[row : row + 1])
        assert alone.scales.equal(whole.scales[row : row + 1])


@given(weights(), formats)
def test_shapes_for_every_row_length(weight: Tensor, fmt: QuantFormat) -> None:
    quantized = quantize(weight.unsqueeze(0), fmt)
    values_shape, scales_shape = fmt.storage_shapes((1, *weight.shape))
    assert (quantized.q.shape, quantized.scales.shape) == (values_shape, scales_shape)
    assert quantized.shape == (1, *weight.shape)
    assert quantized.int_values().shape == (1, *weight.shape)
    assert quantized.int_values().dtype == torch.int8
    assert dequantize(quantized)[0].equal(dequantize(quantized[0]))


@settings(max_examples=20)
@given(formats, st.integers(0, 1000))
def test_bf16_weights_quantize_like_fp32_weights(fmt: QuantFormat, seed: int) -> None:
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert dequantize(quantize(weight, fmt)).equal(dequantize(quantize(weight.float(), fmt)))


def test_the_low_bits_hold_the_first_int4() -> None:
    quantized = quantize(torch.tensor([[-8.0, 7.0, 1.0]]), QuantFormat(4, 8))
    assert quantized.int_values().tolist() == [[-8, 7, 1]]
    assert quantized.q.tolist() == [[0 | 15 << 4, 9 | 8 << 4]]


def test_a_weight_too_small_for_a_scale_is_zero() -> None:
    assert not dequantize(quantize(torch.full((1, 8), MIN_GROUP_MAX / 2), QuantFormat(8, 8))).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_an_error(bad: float) -> None:
    weight = torch.ones(3, 100)
    weight[1, 70] = bad
    with pytest.raises(CoterieError, match="NaN or infinity"):
        quantize(weight, QuantFormat(8, 64))


def test_unknown_formats_are_an_error() -> None:
    with pytest.raises(CoterieError, match=r"'int3'.* known: int8, int4"):
        parse_format("int3")
    with pytest.raises(CoterieError, match="group of 12; it must be a multiple of 8"):
        parse_format("int4", 12)
    with pytest.raises(CoterieError, match="5 bits; known: 8, 4"):
        QuantFormat(5, 64)


def expert(seed: int, hidden: int = 512, width: int = 256) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(2 * width, hidden, generator=draw) * hidden**-0.5
    return gate_up, torch.randn(hidden, width, generator=draw) * width**-0.5


def layer_error(fmt: QuantFormat) -> float:
    """The relative error of one expert with Gaussian weights over 64 tokens."""
    gate_up, down = expert(0)
    x = torch.randn(64, gate_up.shape[1], generator=torch.Generator().manual_seed(1))
    routing = one_expert_routing(64)
    slot = torch.zeros(1, dtype=torch.int64)
    true = ops.run_experts(x, routing, Slab(gate_up[None], down[None], slot))
    coarse = Slab(quantize(gate_up[None], fmt), quantize(down[None], fmt), slot)
    return float((ops.run_experts(x, routing, coarse) - true).norm() / true.norm())


def one_expert_routing(tokens: int) -> Routing:
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    return Routing(ids, torch.ones(tokens, 1), torch.ones(1, dtype=torch.bool), ids)


@pytest.mark.parametrize(
    ("name", "group", "bound"),
    [("int8", 64, 0.0105), ("int8", 128, 0.0115), ("int4", 32, 0.147), ("int4", 64, 0.163)],
)
def test_the_error_of_a_gaussian_expert(name: str, group: int, bound: float) -> None:
    assert 0.75 * bound < layer_error(parse_format(name, group)) < bound


def test_quantized_experts_equal_dequantized_ones() -> None:
    draw = torch.Generator().manual_seed(5)
    gate_up, down = torch.randn(3, 20, 33, generator=draw), torch.randn(3, 33, 10, generator=draw)
    x = torch.randn(7, 33, generator=draw).bfloat16()
    ids = torch.randint(-1, 4, (7, 2), generator=draw)
    routing = Routing(ids, torch.rand(7, 2, generator=draw), torch.ones(4, dtype=torch.bool), ids)
    slot_of = torch.tensor([2, -1, 0, 1])
    for fmt in (QuantFormat(8, 64), QuantFormat(4, 32)):
        coarse = quantize(gate_up, fmt), quantize(down, fmt)
        result = ops.run_experts(x, routing, Slab(*coarse, slot_of))
        dequantized = Slab(dequantize(coarse[0]), dequantize(coarse[1]), slot_of)
        assert result.dtype == torch.float32
        assert result.equal(reference.run_experts(x.float(), routing, dequantized))


def test_the_size_of_a_quantized_weight() -> None:
    quantized = quantize(torch.zeros(3, 4, 65), QuantFormat(8, 64))
    assert isinstance(quantized, QTensor)
    assert (len(quantized), quantized.nbytes) == (3, 3 * 4 * (65 + 2 * 2))
    assert quantize(torch.zeros(3, 4, 65), QuantFormat(4, 32)).nbytes == 3 * 4 * (33 + 3 * 2)
