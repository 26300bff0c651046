"""The engine on tiny random models: rows side by side, policies, events, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

import coterie
from coterie.engine.active_sequence import group_sequences
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Finished, Result
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import ConfigError, CoterieError, GenerationError, NonFiniteLogitsError
from coterie.loading.load import Model
from coterie.routing import Vanilla, parse_policy
from coterie.telemetry import TensorRecorder
from coterie.testing import FAMILY_CONFIGS, random_transformer, read_spec, tiny_config
from coterie.tokenizer import IdTokenizer
from coterie.values import NO_MASK, Scores

VOCABULARY, MASK = 96, 95
PROMPT = [5, 17, 33, 2, 9]


@cache
def tiny(family: str = "llada2", ends: tuple[int, ...] = (94,)) -> Model:
    kind, spec = read_spec(tiny_config(family))
    return Model(
        name=f"tiny {family}",
        family=kind,
        transformer=random_transformer(spec, seed=1),
        tokenizer=IdTokenizer(VOCABULARY),
        mask_id=NO_MASK if kind.defaults.mask_id == NO_MASK else MASK,
        eos_ids=ends,
    )


def engine(family: str = "llada2", ends: tuple[int, ...] = (94,), **options: object) -> Engine:
    usual = {"block": 8, "max_new_tokens": 12} | options
    return Engine(tiny(family, ends), generation=GenerationConfig().replace(**usual))


def known(result: Result) -> Result:
    """What must not depend on the clock."""
    return replace(result, seconds=0.0)


def finish(host: Engine, numbers: list[int]) -> list[Result]:
    """The results of these rows, in their order."""
    found: dict[int, Result] = {}
    while host.rows:
        found |= {e.row: e.result for e in host.step() if isinstance(e, Finished)}
    return [found[number] for number in numbers]


prompt_ids = st.lists(st.integers(0, 93), min_size=1, max_size=20)
requests = st.fixed_dictionaries(
    {
        "prompt": prompt_ids,
        "policy": st.sampled_from(["vanilla", "des-vote:beta=0.5", "des-seq:k=2", "topk:k=2"]),
        "max_new_tokens": st.integers(1, 14),
        "block": st.sampled_from([4, 8]),
        "kv_cache": st.sampled_from(
            ["block-causal", "block-causal-uncached", "uncached", "prefix", "dual:before=2,after=3"]
        ),
        "unmask": st.sampled_from(
            ["threshold:p=0.2", "dynamic:p=0.9,steps=3", "fixed:steps=4", "threshold:p=0.3+smooth",
             "dynamic:p=0.3+edit:p=0.4,post=2", "threshold:p=0.3+credit"]
        ),
        "temperature": st.sampled_from([0.0, 0.8]),
        "seed": st.integers(0, 9),
    }
)  # fmt: skip


@law(10)
@given(st.lists(requests, min_size=2, max_size=3), st.integers(0, 3))
def test_batched_requests_equal_single_requests(wanted: list[dict], late: int) -> None:
    host = engine()
    numbers = [host.submit(**wanted[0])]
    for _ in range(late):
        if host.rows:
            told = host.step()
            if any(isinstance(event, Finished) for event in told):
                return
    numbers += [host.submit(**request) for request in wanted[1:]]
    together = finish(host, numbers)
    for request, result in zip(wanted, together, strict=True):
        alone = engine().generate(**request)
        assert result.tokens == alone.tokens
        assert (result.forwards, result.prefills, result.commits) == (
            alone.forwards,
            alone.prefills,
            alone.commits,
        )
        assert result.experts == alone.experts
        assert result.vote_mass_kept == pytest.approx(alone.vote_mass_kept, rel=1e-5)


def test_requests_of_one_width_share_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    host = engine()
    for prompt in ([1, 2, 3], [4] * 13, [7] * 30):
        host.submit(prompt)
    assert [len(group) for group in group_sequences(host._active.values())] == [
        1,
        1,
        1,
    ]  # two prefills
    host.step()
    assert [len(group) for group in group_sequences(host._active.values())] == [3]


def test_commits_share_forwards_with_decodes_unless_recorded() -> None:
    host = engine(unmask="fixed:steps=2", early_stop="off")
    first = host.submit(PROMPT)
    for _ in range(2):
        host.step()
    second = host.submit([8, 8])
    active = list(host._active.values())
    assert [each.next_pass.kind for each in active] == ["commit", "decode"]
    assert [len(group) for group in group_sequences(active, mix_commits=True)] == [2]
    assert [len(group) for group in group_sequences(active)] == [1, 1]
    recorder = TensorRecorder()
    host.set_recorder(recorder)
    host.step()
    assert recorder.rows == [(second,)]
    host.set_recorder(None)
    results = [known(result) for result in finish(host, [first, second])]
    alone = [engine(unmask="fixed:steps=2", early_stop="off") for _ in results]
    prompts = (PROMPT, [8, 8])
    assert results == [
        known(each.generate(prompt)) for each, prompt in zip(alone, prompts, strict=True)
    ]


@given(st.sampled_from(["uncached", "prefix", "dual", "block-causal"]), st.integers(0, 20))
@law(4)
def test_full_share_is_vanilla(plan: str, seed: int) -> None:
    prompt = torch.randint(0, 90, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    expected = engine(kv_cache=plan).generate(prompt)
    for policy in ("des-vote:beta=1", "des-seq:k=8", "topk:k=4"):
        assert engine(kv_cache=plan).generate(prompt, policy=policy).tokens == expected.tokens


@given(st.lists(st.integers(0, 93), min_size=1, max_size=20), st.sampled_from([4, 8]))
@law(8)
def test_a_cache_of_finished_blocks_is_exact(prompt: list[int], block: int) -> None:
    cached = engine(block=block).generate(prompt, kv_cache="block-causal")
    whole = engine(block=block).generate(prompt, kv_cache="block-causal-uncached")
    assert cached.tokens == whole.tokens
    assert cached.forwards == whole.forwards
    assert (whole.prefills, whole.commits) == (0, 0)
    assert cached.prefills == (len(prompt) >= block)
    assert cached.commits == cached.blocks - 1


@pytest.mark.parametrize("beta", [0.25, 0.5])
def test_a_coreset_bounds_the_experts_of_decoding(beta: float) -> None:
    result = engine().generate([3] * 20, policy=f"des-vote:beta={beta}")
    assert result.experts.max <= beta * 16
    assert result.expert_bytes == pytest.approx(result.experts.mean * 3 * 32 * 16 * 4)
    assert result.expert_bytes < result.expert_bytes_vanilla
    assert 0 < result.vote_mass_kept < 1


@pytest.mark.parametrize("plan", ["block-causal", "dual"])
def test_policy_routes_only_decode_forwards_by_default(plan: str) -> None:
    policy = parse_policy("des-vote:beta=0.25")
    for asked in ("vanilla", "policy"):
        host = engine(kv_cache=plan, prefill=asked, commit=asked)
        number = host.submit([3] * 20, policy=policy)
        kinds = set()
        while host.rows:
            slot = host._active[number]
            expected = policy if slot.next_pass.kind == "decode" or asked == "policy" else Vanilla()
            assert slot.next_policy() == expected
            kinds.add(slot.next_pass.kind)
            host.step()
        others = {"prefill", "commit"} if plan == "block-causal" else {"refresh"}
        assert kinds == {"decode"} | others


def test_only_decoding_forwards_are_counted() -> None:
    host = engine(kv_cache="dual")
    events = [e for e in host.stream(PROMPT) if isinstance(e, Denoised)]
    assert {e.kind for e in events} == {"refresh", "decode"}
    assert all(bool(e.experts) == (e.kind == "decode") for e in events)


@dataclass(frozen=True)
class Lowest:
    """A caller's own policy, in no table."""

    m: int

    def eligible(self, scores: Scores, k: int) -> Tensor:
        return (torch.arange(scores.router.experts) < self.m).view(1, 1, -1)


def test_user_defined_policy_runs() -> None:
    result = engine().generate(PROMPT, policy=Lowest(5))
    assert result.experts.max <= 5
    assert result.policy == "Lowest(m=5)"


def test_seed_determines_samples() -> None:
    draws = [
        engine(temperature=1.0, early_stop="off").generate(PROMPT, seed=seed).tokens
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_request_stops_after_the_block_with_end_of_text() -> None:
    whole = engine().generate(PROMPT, max_new_tokens=20)
    assert (whole.finish_reason, whole.new_tokens) == ("length", 20)
    end = whole.tokens[5]
    at = whole.tokens.index(end)
    stopped = engine(ends=(end,)).generate(PROMPT, max_new_tokens=20)
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == whole.tokens[:at]
    assert stopped.blocks == (len(PROMPT) + at) // 8 + 1 < whole.blocks
    on = engine(ends=(end,)).generate(PROMPT, max_new_tokens=20, early_stop="off")
    assert (on.tokens, on.finish_reason) == (whole.tokens, "length")


@pytest.mark.parametrize("unmask", ["threshold:p=0.2", "dynamic:p=0.3+edit:p=0.3,post=3"])
def test_events_add_up_to_the_text(unmask: str) -> None:
    *events, last = engine(unmask=unmask).stream(PROMPT)
    assert isinstance(last, Finished)
    told: dict[int, int] = {}
    for number, event in enumerate(events, start=1):
        assert isinstance(event, Denoised)
        assert event.forward == number
        told |= {t.position: t.id for t in (*event.committed, *event.edited)}
        places = [t.position for t in (*event.committed, *event.provisional)]
        assert all(event.start <= place < event.stop for place in places)
    text = tuple(told[place] for place in range(last.result.new_tokens))
    assert text == last.result.tokens
    assert "".join(e.text for e in events if isinstance(e, Denoised)) == last.result.text
    assert known(engine(unmask=unmask).generate(PROMPT)) == known(last.result)


@law(12)
@given(wanted=requests)
def test_streamed_text_only_grows_to_the_answer(wanted: dict) -> None:
    host, text = engine(), ""
    number = host.submit(**wanted)
    while host.rows:
        for event in host.step():
            if isinstance(event, Denoised):
                text += event.text
            else:
                assert text == event.result.text
                assert event.row == number


@law(3)
@given(prompts=st.lists(prompt_ids, min_size=1, max_size=4), size=st.integers(1, 4))
def test_a_list_of_prompts_gives_the_results_of_each(prompts: list[list[int]], size: int) -> None:
    host = engine()
    single = [known(engine().generate(prompt)) for prompt in prompts]
    bystander = host.submit(PROMPT)
    assert [known(result) for result in host.generate(prompts, batch_size=size)] == single
    assert set(host.rows) <= {bystander}
    assert {event.row for event in host.step()} <= {bystander}


def test_prompts_may_be_arrays_tensors_and_texts() -> None:
    answer = engine(max_new_tokens=4).generate(PROMPT).tokens
    host: Any = engine(max_new_tokens=4)
    rows = np.array([PROMPT, PROMPT])
    for prompt in (np.array(PROMPT), torch.tensor(PROMPT), list(torch.tensor(PROMPT))):
        assert host.generate(prompt).tokens == answer
    for prompts in (
        rows,
        torch.tensor(rows),
        list(rows),
        ["5 17 33 2 9", PROMPT],
        (PROMPT, PROMPT),
    ):
        results = host.generate(prompts)
        assert [result.tokens for result in results] == [answer, answer]
    with pytest.raises(GenerationError, match="token ids"):
        host.generate([5.5, 6.0])


def test_a_list_with_one_bad_prompt_leaves_no_request() -> None:
    host = engine()
    with pytest.raises(CoterieError):
        host.generate([PROMPT, [VOCABULARY]])
    assert host.rows == ()
    assert host.step() == []


def test_text_goes_in_and_comes_out() -> None:
    result = engine().generate("5 17 33 2 9")
    assert result.text == " ".join(map(str, engine().generate(PROMPT).tokens))
    assert (result.policy, result.model, result.dtype) == ("vanilla", "tiny llada2", "float32")


def test_closing_a_stream_cancels_its_request() -> None:
    host = engine()
    begun, unbegun = host.stream(PROMPT), host.stream(PROMPT)
    next(begun)
    assert len(host.rows) == 2
    begun.close()
    unbegun.close()
    assert host.rows == ()
    for ask in (host.cancel, host.sequence, host.result):
        with pytest.raises(CoterieError, match="no active request 0"):
            ask(0)


def test_interleaved_streams_get_their_own_events() -> None:
    host = engine()
    first, second = host.stream(PROMPT), host.stream([8, 8])
    loose = host.submit([4, 4])
    mixed = [list(first), list(second)]
    assert all(event.row == number for number, events in enumerate(mixed) for event in events)
    assert [known(events[-1].result) for events in mixed] == [
        known(engine().generate(prompt)) for prompt in (PROMPT, [8, 8])
    ]
    left = finish(host, []) or host.step()
    assert host.rows == ()
    assert all(event.row == loose for event in left if isinstance(event, Denoised))


@dataclass(frozen=True)
class Refusing:
    """A policy that cannot route."""

    error: Exception

    def eligible(self, scores: Scores, k: int) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [CoterieError("not today"), OSError("no disk")])
def test_failed_group_does_not_stop_other_requests(error: Exception) -> None:
    host = Engine(tiny(), generation=GenerationConfig().replace(block=8, max_new_tokens=12))
    stuck, well = host.submit(PROMPT, policy=Refusing(error)), host.submit(PROMPT)
    while well in host.rows:
        with pytest.raises(type(error)) as raised:
            host.step()
        assert raised.value is error
    host.cancel(stuck)
    (finished,) = [event for event in host.step() if isinstance(event, Finished)]
    assert known(finished.result) == known(engine().generate(PROMPT))


def test_non_finite_logits_raise_and_do_not_advance() -> None:
    model = tiny()
    broken = replace(model, transformer=replace(model.transformer, head=model.transformer.head * 1))
    host = Engine(broken, generation=GenerationConfig().replace(block=8, max_new_tokens=12))
    number = host.submit(PROMPT)
    host.step()
    tokens = host.sequence(number).canvas.tokens.tolist()
    kept = broken.transformer.head.clone()
    broken.transformer.head[3] = math.nan
    with pytest.raises(CoterieError, match="the head returned NaN"):
        host.step()
    assert host.sequence(number).canvas.tokens.tolist() == tokens
    broken.transformer.head.copy_(kept)
    assert known(finish(host, [number])[0]) == known(engine().generate(PROMPT))


def test_only_the_request_with_non_finite_logits_fails() -> None:
    expected = [known(engine().generate(prompt)) for prompt in (PROMPT, [8] * 5)]
    written = {token for result in expected for token in result.tokens}
    bad = next(token for token in range(90) if token not in {*written, *PROMPT, 8})
    embedding = tiny().transformer.embedding.clone()
    embedding[bad] = math.nan
    model = replace(tiny(), transformer=replace(tiny().transformer, embedding=embedding))
    host = Engine(model, generation=GenerationConfig().replace(block=8, max_new_tokens=12))
    first, broken, last = (host.submit(prompt) for prompt in (PROMPT, [bad] * 5, [8] * 5))
    assert len(group_sequences(host._active.values())) == 1
    for _ in range(2):
        with pytest.raises(NonFiniteLogitsError) as raised:
            host.step()
        assert raised.value.rows == (broken,)
    assert [host.sequence(row).steps.total for row in (first, broken, last)] == [2, 0, 2]
    host.cancel(broken)
    assert [known(result) for result in finish(host, [first, last])] == expected


@law(5)
@given(st.lists(prompt_ids, min_size=2, max_size=4), st.sampled_from([0.15, 0.3]))
def test_rows_of_a_forward_may_share_one_coreset(prompts: list[list[int]], beta: float) -> None:
    host, recorder = engine(unmask="fixed:steps=2"), TensorRecorder()
    host.set_recorder(recorder)
    budget = max(1, int(beta * 16))
    results = host.generate(prompts, policy=f"des-vote:beta={beta},scope=batch")
    assert all(int(routing.used.sum()) <= budget for _, _, routing in recorder.routings)
    # A row counts its own experts: at most those of the coreset.
    assert all(result.experts.max <= budget for result in results)
    host.set_recorder(None)
    recorded = len(recorder.routings)
    (alone,) = host.generate(prompts[:1], policy=f"des-vote:beta={beta},scope=batch")
    assert len(recorder.routings) == recorded > 0
    lone = engine(unmask="fixed:steps=2").generate(prompts[0], policy=f"des-vote:beta={beta}")
    assert alone.tokens == lone.tokens


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1, MASK]}, "the prompt contains the mask token"),
        ({"prompt": [96]}, "96 is not a token id below 96"),
        ({"prompt": [-1]}, "prompt: -1 is not"),
        ({"prompt": [1] * 510}, "need at least 522 positions; the model has 512"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be of type int"),
        ({"block": 0}, "block must be at least 1"),
        ({"block": True}, "block must be of type int"),
        ({"unmask": "threshold:p=1.1"}, "p must be above 0 and at most 1, not 1.1"),
        ({"unmask": "certain"}, "unknown unmasking rule 'certain'; known: dynamic"),
        ({"kv_cache": "none"}, "unknown KV scheme 'none'; known: block-causal"),
        ({"policy": "des-vite"}, "unknown policy 'des-vite'; known"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": math.nan}, "temperature must be at least 0, not nan"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"early_stop": True}, "early_stop must be one of off, block, token"),
        ({"commit": "maybe"}, "`commit_routing` must be one of vanilla, policy"),
        ({"steps": 3}, "unknown option 'steps'; known: max_new_tokens, block"),
    ],
)
def test_invalid_options_raise(options: dict[str, object], told: str) -> None:
    host = engine()
    with pytest.raises(CoterieError, match=told):
        host.generate(**({"prompt": PROMPT} | options))  # type: ignore[arg-type]
    assert host.rows == ()


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_family_runs_with_its_defaults(family: str) -> None:
    model = tiny(family)
    result = Engine(model).generate(PROMPT, max_new_tokens=6)
    assert result.new_tokens == 6 or result.finish_reason == "stop"
    assert result.kv_cache == model.family.defaults.kv_cache


def test_old_names_of_options() -> None:
    assert GenerationConfig().replace(plan="uncached") == GenerationConfig(kv_cache="uncached")
    with pytest.raises(ConfigError, match="expert_dtype"):
        coterie.load(experts="int8")
