"""Settled tokens leave the forwards of their block, which read the keys that they had."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from test_cuda_graphs import Counted
from test_engine import engine, finish, known, prompt_ids
from torch import Tensor

from coterie import ops
from coterie.cli.entry import run as command
from coterie.decoding import DecodeRequest, SequenceState
from coterie.engine.cuda_graphs import CudaGraphs
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.engine.observation import observe_forwards
from coterie.errors import ConfigError, SpecError
from coterie.lab.likelihood.estimator import LikelihoodEstimator
from coterie.loading.load import Model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.routing import parse_policy
from coterie.values import Window

MODELS = st.sampled_from(
    [
        ("llada2", "block-causal"),
        ("llada2", "block-causal:commit=joined"),
        ("sdar-moe", "block-causal"),
        ("sdar-moe", "block-causal:commit=joined"),
        ("llada-moe", "dual:before=2,after=3"),
        ("llada-moe", "dual:warmup=2"),
        ("llada-moe", "prefix"),
    ]
)
limits = st.sampled_from([1, 2, 4])
options = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(["vanilla", "des-vote:beta=0.3", "des-seq:k=2"]),
        "max_new_tokens": st.integers(1, 20),
        "block": st.sampled_from([4, 8]),
        "unmask": st.sampled_from(
            ["fixed:steps=4", "sequential:steps=8", "threshold:p=0.3", "dynamic:p=0.9,steps=6"]
        ),
        "temperature": st.sampled_from([0.0, 0.8]),
        "seed": st.integers(0, 9),
        "early_stop": st.sampled_from(["off", "block"]),
    }
)
refined = options.flatmap(
    lambda wanted: st.sampled_from(["", "+credit", "+smooth"]).map(
        lambda part: wanted | {"unmask": wanted["unmask"] + part}
    )
)


# The plain reference: whole blocks are computed, and the cache refuses new keys of settled tokens.


@dataclass(frozen=True)
class FrozenCache(KVCache):
    """A cache of one row that keeps the keys at some positions."""

    frozen: Tensor | None = None  # [length] bool

    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        assert self.frozen is not None
        open_ = ~self.frozen[positions[0]]
        super().write(layer, positions[:, open_], key[:, open_], value[:, open_])


@torch.inference_mode()
def reference(model: Model, request: DecodeRequest, policy: str, least: int) -> tuple:
    """Tokens, denoising forwards and positions that need computing."""
    sequence, spec = SequenceState(request), model.spec
    cache = KVCache.allocate(spec, 1, sequence.canvas.length, dtype=model.transformer.dtype)
    elected, vanilla = parse_policy(policy), parse_policy("vanilla")
    block, needed, held = None, 0, torch.zeros(0)
    while (window := sequence.next_pass) is not None:
        if sequence.block is not block:
            block = sequence.block
            held = torch.zeros(block.width)
        masked = sequence.canvas.is_masked(block.start, block.stop)
        frozen = torch.zeros(cache.length, dtype=torch.bool)
        if window.kind == "decode" and window.use_cache and bool(masked.any()):
            frozen[block.start : block.stop] = held >= least
        positions = torch.arange(window.start, window.stop)
        in_voters = (positions >= window.voters[0]) & (positions < window.voters[1])
        logits_at = positions[block.contains(positions) & ~frozen[positions]]
        context = ForwardContext(
            window=Window(
                torch.tensor([window.start]),
                window.width,
                torch.tensor([window.visible]),
                window.causal_block,
            ),
            cache=FrozenCache(cache.keys, cache.values, None, frozen) if window.use_cache else None,
            policy=elected if window.kind == "decode" else vanilla,
            committed=window.committed,
            commit_policy=vanilla,
            logits_indices=logits_at - window.start,
            voters=(in_voters & ~frozen[positions]).float()[None],
        )
        logits = model.transformer(sequence.input_tokens(window)[None], context)
        if not window.is_denoising:
            sequence.receive(None)
            continue
        held += ~masked
        needed += window.width - int(frozen.sum())
        sequence.receive(logits, None, logits_at - block.start)
    return tuple(sequence.answer), sequence.steps.total, needed


@law(40)
@given(MODELS, prompt_ids, options, limits)
def test_tokens_equal_those_of_whole_forwards_with_kept_keys(
    kind: tuple[str, str], prompt: list[int], wanted: dict, least: int
) -> None:
    family, kv_cache = kind
    host, policy = engine(family, kv_cache=kv_cache), wanted["policy"]
    result = host.generate(prompt, **wanted, skip_settled=least)
    plain = {name: value for name, value in wanted.items() if name != "policy"}
    request = host._request(prompt, host.generation.replace(**plain))
    with pytest.MonkeyPatch.context() as patch:
        for fused in ("fused_attention", "fused_attention_layer"):
            patch.setattr(ops, fused, lambda *_, **__: None)
        expected = reference(host.model, request, policy, least)
    assert (result.tokens, result.forwards, result.computed_positions) == expected


@law(20)
@given(MODELS, prompt_ids, refined)
def test_a_limit_of_all_steps_equals_off(
    kind: tuple[str, str], prompt: list[int], wanted: dict
) -> None:
    host = engine(kind[0], kv_cache=kind[1])
    steps = host.generate(prompt, **wanted).forwards
    off, late = (host.generate(prompt, **wanted, skip_settled=n) for n in (None, steps))
    assert replace(known(late), skip_settled=None) == known(off)


@law(12)
@given(MODELS, prompt_ids, refined, limits)
def test_a_smaller_limit_computes_no_more_in_as_many_forwards(
    kind: tuple[str, str], prompt: list[int], wanted: dict, least: int
) -> None:
    host = engine(kind[0], kv_cache=kind[1])
    wanted |= {"unmask": "sequential:steps=4", "early_stop": "off"}
    results = [
        host.generate(prompt, **wanted, skip_settled=n) for n in (least, least + 1, 99, None)
    ]
    computed = [result.computed_positions for result in results]
    assert computed == sorted(computed)
    assert len({(result.forwards, result.commits, result.blocks) for result in results}) == 1


@law(12)
@given(st.lists(st.tuples(prompt_ids, refined, limits), min_size=2, max_size=3))
def test_rows_of_a_batch_equal_those_alone(rows: list[tuple[list[int], dict, int]]) -> None:
    host = engine()
    numbers = [host.submit(prompt, **wanted, skip_settled=n) for prompt, wanted, n in rows]
    for (prompt, wanted, n), result in zip(rows, finish(host, numbers), strict=True):
        alone = engine().generate(prompt, **wanted, skip_settled=n)
        assert (result.tokens, result.forwards, result.computed_positions) == (
            *(alone.tokens, alone.forwards, alone.computed_positions),
        )
        assert result.experts == alone.experts


def keys_before(host: Engine, prompt: list[int], stop: int, **wanted: object) -> list[Tensor]:
    """The keys and values before a position, when a forward of the block there begins."""
    number = host.submit(prompt, **wanted)
    while True:
        host.step()
        sequence, window = host.sequence(number), host.sequence(number).next_pass
        assert window is not None
        if sequence.block.start == stop and window.is_denoising and window.start == stop:
            cache = host._kv_pool.rows([host._active[number].cache_row])
            kept = [each[0, :, :stop].clone() for each in (*cache.keys, *cache.values)]
            host.cancel(number)
            return kept


@pytest.mark.parametrize("family", ["llada2", "sdar-moe"])
@pytest.mark.parametrize("kv_cache", ["block-causal", "block-causal:commit=joined"])
def test_finished_blocks_have_exact_keys(family: str, kv_cache: str) -> None:
    host, prompt = engine(family, kv_cache=kv_cache), [5, 17, 33, 2, 9, 4, 4, 8]
    wanted = {"max_new_tokens": 32, "unmask": "sequential:steps=8", "early_stop": "off"}
    number = host.submit(prompt, **wanted, skip_settled=1)
    while host.sequence(number).block.index < 2:
        host.step()
    tokens = host.sequence(number).canvas.tokens[:24].tolist()
    host.cancel(number)
    skipped = keys_before(host, prompt, 24, **wanted, skip_settled=1)
    prefilled = keys_before(host, tokens, 24, **wanted)
    for ours, exact in zip(skipped, prefilled, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)


def test_fewer_positions_use_fewer_experts() -> None:
    host = engine("llada2", unmask="sequential:steps=8", early_stop="off", max_new_tokens=16)
    off, on = (host.generate([3] * 8, skip_settled=n) for n in (None, 1))
    assert (off.forwards, off.computed_positions) == (16, 16 * 8)
    # A token is computed once more after the step that wrote it.
    assert (on.forwards, on.computed_positions) == (16, 2 * (8 + 8 + 7 + 6 + 5 + 4 + 3 + 2))
    assert on.experts.mean < off.experts.mean


@pytest.mark.parametrize(
    "policy", ["vanilla", "des-vote:beta=0.3,voters=masked", "mc-moe:beta=0.5"]
)
def test_policies_see_the_tokens_that_are_computed(policy: str) -> None:
    host = engine("llada2", unmask="sequential:steps=4", max_new_tokens=16)
    result = host.generate([3] * 8, policy=policy, skip_settled=1)
    assert result.computed_positions < 8 * result.forwards


def test_graphs_replay_only_whole_blocks() -> None:
    host = engine("llada2", unmask="sequential:steps=4", max_new_tokens=24, early_stop="off")
    expected = known(host.generate([3] * 8, skip_settled=2))
    capture = Counted()
    host._graphs = CudaGraphs(host.model.transformer, capture)
    assert known(host.generate([3] * 8, skip_settled=2)) == expected
    assert capture.replays > 0


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ({"unmask": "threshold:p=0.5+edit"}, "edit"),
        ({"unmask": "joint-edit"}, "joint-edit"),
        ({"unmask": "joint-threshold-indel"}, "joint-threshold-indel"),
        ({"unmask": "renoise", "kv_cache": "encoder"}, "renoise"),
        ({"kv_cache": "uncached"}, "uncached"),
        ({"kv_cache": "block-causal-uncached"}, "block-causal-uncached"),
    ],
)
def test_what_may_change_tokens_or_caches_none_is_refused(wanted: dict, name: str) -> None:
    GenerationConfig(**wanted)
    with pytest.raises(ConfigError, match=rf"`skip_settled`.*{name}"):
        GenerationConfig(**wanted, skip_settled=2)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_the_limit_is_a_positive_number(limit: object) -> None:
    with pytest.raises(SpecError, match="skip_settled"):
        engine(skip_settled=limit)


def test_a_model_that_routes_by_whole_blocks_is_refused() -> None:
    host = engine("llada2.2", unmask="threshold", max_new_tokens=4)
    host.generate([5])
    with pytest.raises(ConfigError, match="`skip_settled`"):
        host.generate([5], skip_settled=1)


def test_observed_and_scored_forwards_are_whole() -> None:
    host = engine(skip_settled=1)
    with pytest.raises(ConfigError, match="`skip_settled`"):
        observe_forwards(host, [[5]], lambda _: None)
    with pytest.raises(ConfigError, match="`skip_settled`"):
        LikelihoodEstimator(host).score([], ["vanilla"])


def test_a_trace_that_cannot_be_recorded_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["trace", "-o", str(tmp_path / "t.trace"), "--num-problems", "1"]
    assert command([*words, "--skip-settled", "1"]) == 2
    assert "--skip-settled" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_reports_the_positions(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "Solve 3x + 4 = 19 for x.", "--unmask", "sequential:steps=8", "--json"]
    assert command([*words, "-n", "32"]) == 0
    off = json.loads(capsys.readouterr().out)
    assert command([*words, "-n", "32", "--skip-settled", "1"]) == 0
    on = json.loads(capsys.readouterr().out)
    assert not {"skip_settled", "computed_positions"} & set(off)
    assert on["skip_settled"] == 1
    assert on["computed_positions"] < 32 * on["forwards"] == 32 * off["forwards"]
    assert command([*words, "--skip-settled", "1", "--kv-cache", "uncached"]) == 2
    assert "--skip-settled" in capsys.readouterr().err
