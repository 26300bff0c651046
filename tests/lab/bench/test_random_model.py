"""Shapes of published models, and random models of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from released_configs import LLADA2_FLASH, LLADA2_MINI, LLADA_MOE

from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CoterieError
from coterie.lab.bench.model import random_experts, random_model, repeat_experts
from coterie.lab.bench.routings import find_skew
from coterie.lab.bench.shapes import SHAPES, find_shape
from coterie.model.forward_context import ForwardContext
from coterie.ops import run_experts
from coterie.routing import Vanilla
from coterie.telemetry import ExpertCounter
from coterie.testing import read_spec
from coterie.values import PackedExperts, Routing, Window, expert_mask

TINY = SHAPES["tiny"]


@pytest.mark.parametrize(
    ("name", "config"),
    [("llada2-mini", LLADA2_MINI), ("llada2-flash", LLADA2_FLASH), ("llada-moe", LLADA_MOE)],
)
def test_a_shape_equals_the_released_config(name: str, config: dict) -> None:
    family, spec = read_spec(config)
    assert SHAPES[name].spec == spec
    assert SHAPES[name].family == family


def test_an_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(CoterieError, match=r"unknown shape 'llada3'; known: llada2-mini, .*tiny"):
        find_shape("llada3")


def test_a_truncated_shape_has_a_moe_layer() -> None:
    assert TINY.truncate(2).spec.moe == (False, True)
    assert TINY.truncate(None) is TINY
    for layers in (0, 1, 4):
        with pytest.raises(CoterieError, match=f"`layers` is {layers} for Tiny; must be 2 to 3"):
            TINY.truncate(layers)


def test_uncounted_routers_are_as_skewed_as_minis() -> None:
    skew = find_skew(SHAPES["llada2-mini"].spec.router, SHAPES["llada2-mini"].unique_experts)
    assert find_skew(
        SHAPES["sdar-moe"].spec.router, SHAPES["sdar-moe"].unique_experts
    ) == pytest.approx(skew, abs=0.05)


# Random models


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int8", "int4"])
def test_a_random_model_repeats_a_few_experts(experts: str) -> None:
    generator = torch.Generator().manual_seed(3)
    spec = TINY.spec
    distinct = random_experts(spec, experts, generator, torch.device("cpu"))
    repeated = repeat_experts(distinct, 7)
    x = torch.randn(9, spec.hidden, generator=generator)
    x = x if experts == "fp32" else x.bfloat16()
    ids = torch.randint(0, 7, (9, 3), generator=generator)
    weights = torch.rand(9, 3, generator=generator)

    def routing(ids: torch.Tensor, count: int) -> Routing:
        return Routing(ids, weights, expert_mask(ids.flatten(), count), ids)

    y = run_experts(x, routing(ids, 7), repeated)
    assert torch.allclose(y, run_experts(x, routing(ids % 2, 2), distinct), rtol=1e-5, atol=1e-7)
    assert float(y.abs().mean()) > 0


def test_each_copy_of_an_expert_has_its_own_memory() -> None:
    distinct = random_experts(TINY.spec, "bf16", torch.Generator(), torch.device("cpu"))
    repeated = repeat_experts(distinct, 32)
    total_bytes = (
        repeated.gate_up.packed if isinstance(repeated.gate_up, PackedExperts) else repeated.gate_up
    )
    assert len(total_bytes) == 32
    assert total_bytes.stride(0) == total_bytes[0].numel()


@pytest.mark.parametrize("name", ["tiny", "llada-moe"])
def test_skewed_gates_use_as_many_experts_as_the_model(name: str) -> None:
    shape = SHAPES[name]
    if name != "tiny":
        attention = {"heads": 2, "kv_heads": 2, "head_dim": 16, "rotary_dim": 8}
        small = {"vocabulary": 512, "hidden": 256, "expert_width": 16, **attention}
        shape = replace(shape, spec=replace(shape.spec, **small)).truncate(4)
    model = random_model(shape, "bf16")
    counter, generator = ExpertCounter(), torch.Generator().manual_seed(1)
    for number in range(6):
        ids = torch.randint(0, model.mask_id, (1, 32), generator=generator)
        counter.on_forward((number,))
        span = torch.tensor([32])
        step = ForwardContext(Window(span * 0, 32, span), None, Vanilla(), counter)
        model.transformer(ids, step)
    unique_experts = sum(counter.counts(number).mean for number in range(6)) / 6
    assert unique_experts == pytest.approx(shape.unique_experts, rel=0.12)


def test_a_random_model_depends_on_its_seed_only() -> None:
    first, again, other = (random_model(TINY, "int8", layers=2, seed=s) for s in (1, 1, 2))
    options = GenerationConfig.for_family(TINY.family.defaults).replace(max_new_tokens=8, block=8)
    texts = [
        Engine(m, generation=options).generate("5 17 33").tokens for m in (first, again, other)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.lab.bench.model.free_memory", lambda _device: 1 << 10)
    with pytest.raises(CoterieError, match="GiB are free; reduce `layers`"):
        random_model(TINY)


# One layer, and baselines
