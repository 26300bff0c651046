"""Slices of a prefill and cached prefixes change no answer, in any family and in any company."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.engine.engine import Engine
from coterie.engine.events import Finished, Result
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import ConfigError
from coterie.loading.load import Model
from coterie.testing import random_transformer, read_spec, tiny_config
from coterie.tokenizer import IdTokenizer
from coterie.values import NO_MASK

FAMILIES = ("llada2", "llada2.2", "llada-moe", "sdar-moe", "diffusion-gemma")
POLICIES = ("vanilla", "des-vote:beta=0.3", "topk:k=2")
PROMPTS = torch.randint(0, 91, (2, 90), generator=torch.Generator().manual_seed(3)).tolist()
MODES = ("vanilla", "policy")


@cache
def tiny(family: str) -> Model:
    kind, spec = read_spec(tiny_config(family))
    return Model(
        name=f"tiny {family}",
        family=kind,
        transformer=random_transformer(spec, seed=1),
        tokenizer=IdTokenizer(spec.vocabulary),
        mask_id=NO_MASK if kind.defaults.mask_id == NO_MASK else 95,
        eos_ids=(94,),
    )


def engine(family: str, **settings: Any) -> Engine:
    """An engine whose scheme writes keys of the prompt, with few forwards a block."""
    model = tiny(family)
    config = GenerationConfig.for_family(model.defaults).replace(max_new_tokens=20)
    if model.mask_id == NO_MASK:
        config = config.replace(unmask="renoise:steps=2")
    else:
        config = config.replace(kv_cache="block-causal", unmask="fixed:steps=2")
    return Engine(model, generation=config, **settings)


@st.composite
def requests(draw: st.DrawFn, family: str) -> tuple[tuple[str, Any], ...]:
    """The arguments of a request; its prompt is a prefix of a known text with another end."""
    text, length = draw(st.sampled_from(PROMPTS)), draw(st.integers(1, 80))
    end = draw(st.lists(st.integers(0, 91), max_size=2))
    usual = engine(family).generation
    plan, unmask = usual.kv_cache, usual.unmask
    if tiny(family).mask_id != NO_MASK:
        plan += draw(st.sampled_from(["", ":commit=joined"]))
        unmask += draw(st.sampled_from(["", "+smooth", "+edit:p=0.4,post=1"]))
    options = {
        "prompt": (*text[:length], *end),
        "policy": draw(st.sampled_from(POLICIES)),
        "block": draw(st.sampled_from([8, 8, 8, 16, 32])),
        "max_new_tokens": draw(st.integers(1, 30)),
        "kv_cache": plan,
        "unmask": unmask,
        "prefill": draw(st.sampled_from(MODES)),
        "commit": draw(st.sampled_from(MODES)),
        "seed": draw(st.integers(0, 2)),
    }
    return tuple(options.items())


def outcome(result: Result) -> tuple[object, ...]:
    """What neither slices nor a warm cache may change."""
    return result.tokens, result.forwards, result.commits, result.experts


@cache
def alone(family: str, request: tuple[tuple[str, Any], ...]) -> tuple[object, ...]:
    return outcome(engine(family).generate(**dict(request)))


@pytest.mark.parametrize("family", FAMILIES)
@given(st.data(), st.integers(1, 70))
@settings(max_examples=4)
def test_slices_change_no_answer(family: str, data: st.DataObject, chunk: int) -> None:
    request = data.draw(requests(family))
    sliced = engine(family, prefill_chunk=chunk).generate(**dict(request))
    assert outcome(sliced) == alone(family, request)


@pytest.mark.parametrize("family", FAMILIES)
@given(st.integers(1, 80), st.integers(1, 70), st.sampled_from([8, 16, 32]))
def test_slices_write_the_same_keys(family: str, length: int, chunk: int, block: int) -> None:
    whole, sliced = engine(family), engine(family, prefill_chunk=chunk)
    for each in (whole, sliced):
        number = each.submit(PROMPTS[0][:length], block=block)
        while each.sequence(number).next_pass.kind == "prefill":  # type: ignore[union-attr]
            each.step()
    caches = [each._kv_pool.full_cache() for each in (whole, sliced)] if length >= block else []
    for one, other in zip(*((*c.keys, *c.values) for c in caches), strict=True) if caches else ():
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    st.data(),
    st.sampled_from([0, 8_000, 40_000, 10_000_000]),
    st.sampled_from([None, 8, 40]),
)
@settings(max_examples=4)
def test_a_warm_cache_and_other_rows_change_no_answer(
    family: str, data: st.DataObject, budget: int, chunk: int | None
) -> None:
    company = st.tuples(requests(family), st.integers(0, 6), st.booleans())
    asked = data.draw(st.lists(company, min_size=2, max_size=5))
    host = engine(family, prefix_cache_bytes=budget, prefill_chunk=chunk)
    expected, results = dict[int, Any](), dict[int, Result]()

    def step() -> None:
        results.update({e.row: e.result for e in host.step() if isinstance(e, Finished)})

    for request, steps, leaves in asked:
        number = host.submit(**dict(request))
        expected[number] = request
        for _ in range(steps):
            step()
        if leaves and number in host.rows:
            host.cancel(number)
            del expected[number]
        assert host.prefix_cache_stats().bytes <= budget
    while host.rows:
        step()
    assert results.keys() == expected.keys()
    for number, request in expected.items():
        assert outcome(results[number]) == alone(family, request)
        assert results[number].cached_tokens <= results[number].prompt_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_turn_computes_only_what_is_new(family: str) -> None:
    host = engine(family, prefix_cache_bytes=1 << 24)
    first = host.generate(PROMPTS[0][:64], max_new_tokens=64, block=32, early_stop="off")
    assert first.cached_tokens == 0
    turn = [*PROMPTS[0][:64], *first.tokens, *PROMPTS[1][:20]]
    second = host.generate(turn, block=32)
    # The last block of an answer is not committed.
    assert second.cached_tokens == 64 + 32
    assert second.prefills == 1
    assert second.tokens == engine(family).generate(turn, block=32).tokens
    stats = host.prefix_cache_stats()
    assert (stats.hits, stats.tokens) == (1, 96)


def test_keys_that_a_policy_routed_are_not_used_again() -> None:
    prompt, vote = PROMPTS[0][:40], "des-vote:beta=0.3"
    for modes, cached in (({"prefill": "policy"}, 0), ({"commit": "policy"}, 40), ({}, 56)):
        host = engine("llada2", prefix_cache_bytes=1 << 24, prefill_chunk=8)
        first = host.generate(prompt, policy=vote, block=8, max_new_tokens=24, **modes)
        assert first.new_tokens == 24
        assert first.prefills == (1 if "prefill" in modes else 5)
        assert host.generate([*prompt, *first.tokens], block=8).cached_tokens == cached
        policy_prefill = host.generate(prompt, policy=vote, block=8, prefill="policy")
        assert policy_prefill.cached_tokens == 0


def test_other_requests_go_on_between_slices() -> None:
    host = engine("llada2", prefill_chunk=16)
    short = host.submit(PROMPTS[1][:5], block=8, early_stop="off")
    long = host.submit(PROMPTS[0][:80], block=8)
    for slices in range(5):
        result = host.result(short)
        assert result.forwards + result.commits == slices
        assert host.sequence(long).next_pass.start == 16 * slices  # type: ignore[union-attr]
        host.step()
    assert host.sequence(long).next_pass.kind == "decode"  # type: ignore[union-attr]


def test_keys_of_a_forward_with_non_finite_logits_are_not_cached() -> None:
    host = engine("llada2", prefix_cache_bytes=1 << 24)
    number = host.submit(PROMPTS[0][:32], block=8)
    host.step()  # the prefill
    host._kv_pool.full_cache().keys[0][0, :, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN") as raised:
        host.step()
    assert raised.value.rows == (number,)  # type: ignore[attr-defined]
    assert host.prefix_cache_stats().entries == 0


@pytest.mark.parametrize("settings", [{"prefill_chunk": 0}, {"prefix_cache_bytes": -1}])
def test_negative_sizes_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        engine("llada2", **settings)
