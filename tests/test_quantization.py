"""Weights in few bits: laws of the numbers and scales, and the errors of a whole expert."""

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


def grouped(weight: Tensor, form: QuantFormat) -> Tensor:
    """[rows, groups, group], zeros at the end."""
    return F.pad(weight, (0, -weight.shape[-1] % form.group)).unflatten(-1, (-1, form.group))


def by_maximum(weight: Tensor, form: QuantFormat) -> Tensor:
    """What rounding with the scale of the largest weight gives, in levels alike on both sides."""
    x, top = grouped(weight, form), -form.qmin - 1
    scale = (x.abs().amax(-1, keepdim=True) / top).bfloat16().float()
    numbers = (x / scale.where(scale > 0, 1.0)).round().clamp(form.qmin, top)
    return (numbers * scale).flatten(-2)[..., : weight.shape[-1]]


@given(weights(), formats)
def test_what_was_quantised_once_stays(weight: Tensor, form: QuantFormat) -> None:
    once = dequantize(quantize(weight, form))
    assert dequantize(quantize(once, form)).equal(once)


@given(weights(), formats)
def test_a_mirrored_weight_is_mirrored(weight: Tensor, form: QuantFormat) -> None:
    there, back = quantize(weight, form), quantize(-weight, form)
    assert dequantize(there).equal(-dequantize(back))
    assert there.int_values().equal(back.int_values())


@given(weights(), formats, st.integers(-30, 30))
def test_a_power_of_two_goes_into_the_scales(weight: Tensor, form: QuantFormat, power: int) -> None:
    small, large = quantize(weight, form), quantize(weight * 2.0**power, form)
    assert small.q.equal(large.q)
    assert (small.scales.float() * 2.0**power).equal(large.scales.float())


@given(weights(), formats)
def test_no_group_is_worse_than_by_its_maximum(weight: Tensor, form: QuantFormat) -> None:
    def error(found: Tensor) -> Tensor:
        unit = grouped(weight, form).abs().amax(-1).double().clamp(min=1e-300)
        return (grouped(found - weight, form).double() / unit[..., None]).square().sum(-1)

    ours = error(dequantize(quantize(weight, form)))
    assert bool((ours <= error(by_maximum(weight, form)) * (1 + 1e-4) + 1e-12).all())


@given(weights(), formats)
def test_no_weight_is_further_off_than_its_group_allows(weight: Tensor, form: QuantFormat) -> None:
    """Half a step, or what the search cuts off of the largest; and nothing beyond the largest."""
    found = quantize(weight, form)
    most = grouped(weight, form).abs().amax(-1, keepdim=True)
    off = grouped(dequantize(found) - weight, form).abs()
    step = most / (-form.qmin - 1)
    cut = most * (0.3 if form.bits == 4 else 0.09)
    assert bool((off <= torch.maximum(0.51 * step, cut)).all())


@given(weights(), formats)
def test_a_group_of_zeros_is_zeros(weight: Tensor, form: QuantFormat) -> None:
    zeros = quantize(torch.zeros_like(weight), form)
    assert not dequantize(zeros).any()
    assert not zeros.scales.any()
    assert not zeros.int_values().any()


@given(weights(), formats)
def test_rows_do_not_feel_each_other(weight: Tensor, form: QuantFormat) -> None:
    whole = quantize(weight, form)
    for row in range(len(weight)):
        alone = quantize(weight[row : row + 1], form)
        assert alone.q.equal(whole.q[row : row + 1])
        assert alone.scales.equal(whole.scales[row : row + 1])


@given(weights(), formats)
def test_shapes_are_as_promised_at_every_length(weight: Tensor, form: QuantFormat) -> None:
    found = quantize(weight.unsqueeze(0), form)
    held, groups = form.storage_shapes((1, *weight.shape))
    assert (found.q.shape, found.scales.shape) == (held, groups)
    assert found.shape == (1, *weight.shape)
    assert found.int_values().shape == (1, *weight.shape)
    assert found.int_values().dtype == torch.int8
    assert dequantize(found)[0].equal(dequantize(found[0]))


@settings(max_examples=20)
@given(formats, st.integers(0, 1000))
def test_low_precision_weights_are_quantised_as_their_values(form: QuantFormat, seed: int) -> None:
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert dequantize(quantize(weight, form)).equal(dequantize(quantize(weight.float(), form)))


def test_nibbles_hold_the_first_number_low() -> None:
    found = quantize(torch.tensor([[-8.0, 7.0, 1.0]]), QuantFormat(4, 8))
    assert found.int_values().tolist() == [[-8, 7, 1]]
    assert found.q.tolist() == [[0 | 15 << 4, 9 | 8 << 4]]


def test_a_weight_below_what_a_scale_can_say_is_zero() -> None:
    assert not dequantize(quantize(torch.full((1, 8), MIN_GROUP_MAX / 2), QuantFormat(8, 8))).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(3, 100)
    weight[1, 70] = bad
    with pytest.raises(CoterieError, match="NaN or infinity"):
        quantize(weight, QuantFormat(8, 64))


def test_other_formats_are_refused_by_name() -> None:
    with pytest.raises(CoterieError, match="unknown format 'int3' for experts; known: int8, int4"):
        parse_format("int3")
    with pytest.raises(CoterieError, match="group of 12; it must be a multiple of 8"):
        parse_format("int4", 12)
    with pytest.raises(CoterieError, match="5 bits; known: 8, 4"):
        QuantFormat(5, 64)


def expert(seed: int, hidden: int = 512, width: int = 256) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(2 * width, hidden, generator=draw) * hidden**-0.5
    return gate_up, torch.randn(hidden, width, generator=draw) * width**-0.5


def layer_error(form: QuantFormat) -> float:
    """Of a layer of one expert with Gaussian weights, relative, over 64 tokens."""
    gate_up, down = expert(0)
    x = torch.randn(64, gate_up.shape[1], generator=torch.Generator().manual_seed(1))
    routing = everyone(64)
    slot = torch.zeros(1, dtype=torch.int64)
    true = ops.run_experts(x, routing, Slab(gate_up[None], down[None], slot))
    coarse = Slab(quantize(gate_up[None], form), quantize(down[None], form), slot)
    return float((ops.run_experts(x, routing, coarse) - true).norm() / true.norm())


def everyone(tokens: int) -> Routing:
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    return Routing(ids, torch.ones(tokens, 1), torch.ones(1, dtype=torch.bool), ids)


@pytest.mark.parametrize(
    ("name", "group", "most"),
    [("int8", 64, 0.0105), ("int8", 128, 0.0115), ("int4", 32, 0.147), ("int4", 64, 0.163)],
)
def test_a_gaussian_expert_comes_out_this_far_off(name: str, group: int, most: float) -> None:
    assert 0.75 * most < layer_error(parse_format(name, group)) < most


def test_quantised_experts_are_their_dequantised_twins() -> None:
    draw = torch.Generator().manual_seed(5)
    gate_up, down = torch.randn(3, 20, 33, generator=draw), torch.randn(3, 33, 10, generator=draw)
    x = torch.randn(7, 33, generator=draw).bfloat16()
    ids = torch.randint(-1, 4, (7, 2), generator=draw)
    routing = Routing(ids, torch.rand(7, 2, generator=draw), torch.ones(4, dtype=torch.bool), ids)
    slot_of = torch.tensor([2, -1, 0, 1])
    for form in (QuantFormat(8, 64), QuantFormat(4, 32)):
        coarse = quantize(gate_up, form), quantize(down, form)
        found = ops.run_experts(x, routing, Slab(*coarse, slot_of))
        twin = Slab(dequantize(coarse[0]), dequantize(coarse[1]), slot_of)
        assert found.dtype == torch.float32
        assert found.equal(reference.run_experts(x.float(), routing, twin))


def test_a_quantised_weight_says_its_size() -> None:
    found = quantize(torch.zeros(3, 4, 65), QuantFormat(8, 64))
    assert isinstance(found, QTensor)
    assert (len(found), found.nbytes) == (3, 3 * 4 * (65 + 2 * 2))
    assert quantize(torch.zeros(3, 4, 65), QuantFormat(4, 32)).nbytes == 3 * 4 * (33 + 3 * 2)
