"""The bench: shapes, random models, peers that behave and peers that do not, records and plots.

No test here asserts how long anything took.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from released import LLADA2_FLASH, LLADA2_MINI, LLADA_MOE

from coterie.bench.model import random_model, repeated, some_experts
from coterie.bench.routings import bend_for
from coterie.bench.shapes import SHAPES, published
from coterie.engine.config import Generation
from coterie.engine.engine import Engine
from coterie.model.step import Step
from coterie.naming import CoterieError
from coterie.ops import run_experts
from coterie.routing import Vanilla
from coterie.telemetry import Counting
from coterie.testing import read_spec
from coterie.values import Panels, Routing, Window, membership

TINY = SHAPES["tiny"]


# Shapes


@pytest.mark.parametrize(
    ("name", "config"),
    [("llada2-mini", LLADA2_MINI), ("llada2-flash", LLADA2_FLASH), ("llada-moe", LLADA_MOE)],
)
def test_a_shape_is_what_the_released_config_says(name: str, config: dict) -> None:
    family, spec = read_spec(config)
    assert SHAPES[name].spec == spec
    assert SHAPES[name].family is family


def test_an_unknown_shape_names_those_that_are_known() -> None:
    with pytest.raises(CoterieError, match=r"unknown shape 'llada3'; known: llada2-mini, .*tiny"):
        published("llada3")


def test_a_shape_is_cut_to_layers_that_route() -> None:
    assert TINY.cut(2).spec.moe == (False, True)
    assert TINY.cut(None) is TINY
    for layers in (0, 1, 4):
        with pytest.raises(CoterieError, match=f"{layers} layers of Tiny; it takes 2 to 3"):
            TINY.cut(layers)


def test_routers_that_nobody_counted_are_as_skewed_as_minis() -> None:
    bend = bend_for(SHAPES["llada2-mini"].spec.router, SHAPES["llada2-mini"].unique)
    assert bend_for(SHAPES["sdar-moe"].spec.router, SHAPES["sdar-moe"].unique) == pytest.approx(
        bend, abs=0.05
    )


# Random models


@pytest.mark.parametrize("experts", ["fp32", "bf16", "int8", "int4"])
def test_a_random_models_experts_are_a_few_over_and_over(experts: str) -> None:
    draw = torch.Generator().manual_seed(3)
    spec = TINY.spec
    few = some_experts(spec, experts, draw, torch.device("cpu"))
    many = repeated(few, 7)
    x = torch.randn(9, spec.hidden, generator=draw)
    x = x if experts == "fp32" else x.bfloat16()
    ids = torch.randint(0, 7, (9, 3), generator=draw)
    weights = torch.rand(9, 3, generator=draw)

    def routing(ids: torch.Tensor, count: int) -> Routing:
        return Routing(ids, weights, membership(ids.flatten(), count), ids)

    y = run_experts(x, routing(ids, 7), many)
    assert torch.allclose(y, run_experts(x, routing(ids % 2, 2), few), rtol=1e-5, atol=1e-7)
    assert float(y.abs().mean()) > 0


def test_each_copy_of_an_expert_is_in_memory_of_its_own() -> None:
    few = some_experts(TINY.spec, "bf16", torch.Generator(), torch.device("cpu"))
    many = repeated(few, 32)
    whole = many.gate_up.packed if isinstance(many.gate_up, Panels) else many.gate_up
    assert len(whole) == 32
    assert whole.stride(0) == whole[0].numel()


@pytest.mark.parametrize("name", ["tiny", "llada-moe"])
def test_gates_are_bent_until_a_block_uses_as_many_experts_as_the_model_does(name: str) -> None:
    shape = SHAPES[name]
    if name != "tiny":
        few = {"heads": 2, "kv_heads": 2, "head_dim": 16, "rotary_dim": 8}
        small = {"vocabulary": 512, "hidden": 256, "expert_width": 16, **few}
        shape = replace(shape, spec=replace(shape.spec, **small)).cut(4)
    model = random_model(shape, "bf16")
    counting, draw = Counting(), torch.Generator().manual_seed(1)
    for number in range(6):
        ids = torch.randint(0, model.mask_id, (1, 32), generator=draw)
        counting.began((number,))
        span = torch.tensor([32])
        step = Step(Window(span * 0, 32, span), None, Vanilla(), counting)
        model.transformer(ids, step)
    seen = sum(counting.counts(number).mean for number in range(6)) / 6
    assert seen == pytest.approx(shape.unique, rel=0.12)


def test_a_random_model_is_the_same_for_the_same_seed_and_generates() -> None:
    first, again, other = (random_model(TINY, "int8", layers=2, seed=s) for s in (1, 1, 2))
    options = Generation.usual(TINY.family.defaults).but(max_new_tokens=8, block=8)
    texts = [
        Engine(m, generation=options).generate("5 17 33").tokens for m in (first, again, other)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_model_that_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.bench.model.free_memory", lambda _device: 1 << 10)
    with pytest.raises(CoterieError, match="GiB are free; --layers cuts it, --dtype int8"):
        random_model(TINY)
