"""However a forward is cut into windows, rows and positions, it says the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.model import attention
from coterie.model.attention import AttentionMetadata
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.transformer import Transformer
from coterie.routing import Vanilla, parse_policy
from coterie.telemetry import Recorder, TensorRecorder
from coterie.testing import FAMILY_CONFIGS, random_transformer, read_spec, tiny_config
from coterie.values import Policy, Window

LENGTH = 24
FAMILIES = st.sampled_from(sorted(FAMILY_CONFIGS))
BLOCKS = st.sampled_from([1, 3, 4, 8])


def model(family: str = "llada2", **keys: object) -> Transformer:
    _, spec = read_spec(tiny_config(family, **keys))  # type: ignore[arg-type]
    return random_transformer(spec, seed=7)


MODELS = {family: model(family) for family in FAMILY_CONFIGS}


def tokens(rows: int, seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(seed))


def window(*starts: int, width: int, visible: int | list[int], block: int = 0) -> Window:
    seen = visible if isinstance(visible, list) else [visible] * len(starts)
    return Window(torch.tensor(starts), width, torch.tensor(seen), block)


def cache_for(transformer: Transformer, rows: int, length: int = LENGTH) -> KVCache:
    return KVCache.allocate(transformer.spec, rows, length, dtype=torch.float32)


@torch.inference_mode()
def run(
    transformer: Transformer,
    ids: Tensor,
    view: Window,
    cache: KVCache | None = None,
    *,
    policy: Policy | None = None,
    recorder: TensorRecorder | None = None,
    wanted: Tensor | None = None,
    embeddings: Tensor | None = None,
) -> Tensor:
    """Logits [B, W, V], or [P, V] of the wanted positions."""
    step = ForwardContext(
        view,
        cache,
        policy or Vanilla(),
        recorder or Recorder(),
        logits_indices=wanted,
        embeddings=embeddings,
    )
    logits = transformer(ids, step)
    return logits if wanted is not None else logits.unflatten(0, tuple(ids.shape))


def same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@given(family=FAMILIES, block=BLOCKS, cuts=st.lists(st.integers(0, LENGTH), max_size=5))
def test_block_causal_windows_one_by_one_equal_one_forward(
    family: str, block: int, cuts: list[int]
) -> None:
    transformer, ids = MODELS[family], tokens(2)
    whole = run(transformer, ids, window(0, 0, width=LENGTH, visible=LENGTH, block=block))
    cache = cache_for(transformer, 2)
    ends = sorted({min(LENGTH, -(-cut // block) * block) for cut in cuts} - {0} | {LENGTH})
    for start, end in zip([0, *ends], ends, strict=False):
        view = window(start, start, width=end - start, visible=end, block=block)
        same(run(transformer, ids[:, start:end], view, cache), whole[:, start:end])


@given(family=FAMILIES, block=BLOCKS, starts=st.lists(st.integers(0, 5), min_size=2, max_size=4))
def test_rows_at_different_positions_equal_each_row_alone(
    family: str, block: int, starts: list[int]
) -> None:
    transformer, rows = MODELS[family], len(starts)
    ids, at = tokens(rows), [block * start % LENGTH for start in starts]
    width = min(block, LENGTH - max(at))
    cache = cache_for(transformer, rows)
    run(transformer, ids, window(*[0] * rows, width=LENGTH, visible=LENGTH, block=block), cache)
    fresh = torch.stack([tokens(1, seed=9)[0, s : s + width] for s in at])
    together = cache_copy(cache)
    view = window(*at, width=width, visible=[s + width for s in at])
    batched = run(transformer, fresh, view, together)
    for row, start in enumerate(at):
        alone = window(start, width=width, visible=start + width)
        mine = cache_copy(cache).select_rows([row])
        same(run(transformer, fresh[row : row + 1], alone, mine)[0], batched[row])


def cache_copy(cache: KVCache) -> KVCache:
    return KVCache(tuple(k.clone() for k in cache.keys), tuple(v.clone() for v in cache.values))


@given(family=FAMILIES, chosen=st.permutations([0, 1, 2, 3]), count=st.integers(1, 4))
def test_a_view_of_some_rows_reads_and_writes_those_rows(
    family: str, chosen: list[int], count: int
) -> None:
    transformer, ids, picked = MODELS[family], tokens(4), chosen[:count]
    cache = cache_for(transformer, 4)
    run(transformer, ids, window(0, 0, 0, 0, width=LENGTH, visible=LENGTH), cache)
    before = cache_copy(cache)
    view = window(*[8] * count, width=4, visible=LENGTH)
    found = run(transformer, tokens(count, seed=3, length=4), view, cache.select_rows(picked))
    for place, row in enumerate(picked):
        alone = run(
            transformer,
            tokens(count, seed=3, length=4)[place : place + 1],
            window(8, width=4, visible=LENGTH),
            cache_copy(before).select_rows([row]),
        )
        same(alone[0], found[place])
    for now, then in zip(cache.keys, before.keys, strict=True):
        changed = (now != then).any(dim=(1, 3))
        assert {int(row) for row in changed.nonzero()[:, 0]} == set(picked)
        assert {int(position) for position in changed.nonzero()[:, 1]} == {8, 9, 10, 11}


def test_a_view_of_a_view_is_refused() -> None:
    with pytest.raises(ValueError, match="select from the whole cache"):
        cache_for(MODELS["llada2"], 3).select_rows([2, 0]).select_rows([0])


@given(family=FAMILIES)
def test_a_later_write_wins(family: str) -> None:
    transformer, old, new = MODELS[family], tokens(1, seed=1), tokens(1, seed=2)
    whole = window(0, width=LENGTH, visible=LENGTH)
    cache = cache_for(transformer, 1)
    run(transformer, old, whole, cache)
    twice = run(transformer, new, whole, cache)
    same(twice, run(transformer, new, whole))


@given(family=FAMILIES, visible=st.integers(8, LENGTH))
def test_keys_past_visible_have_no_effect(family: str, visible: int) -> None:
    transformer, ids = MODELS[family], tokens(1)
    clean, dirty = cache_for(transformer, 1), cache_for(transformer, 1)
    for tensor in (*dirty.keys, *dirty.values):
        tensor[:, :, visible:] = 1e4
    found = [
        run(transformer, ids[:, :8], window(0, width=8, visible=visible), cache)
        for cache in (clean, dirty)
    ]
    assert torch.equal(found[0], found[1])


def test_a_cleared_row_equals_an_empty_one() -> None:
    transformer = MODELS["llada-moe"]
    cache = cache_for(transformer, 2)
    run(transformer, tokens(2), window(0, 0, width=LENGTH, visible=LENGTH), cache)
    cache.clear([1])
    assert all(bool((t[1] == 0).all() and (t[0] != 0).any()) for t in cache.keys + cache.values)


@given(family=FAMILIES, wanted=st.lists(st.integers(0, 2 * LENGTH - 1), max_size=6))
def test_logits_indices_do_not_change_logits(family: str, wanted: list[int]) -> None:
    transformer, ids = MODELS[family], tokens(2)
    view = window(0, 0, width=LENGTH, visible=LENGTH)
    every = run(transformer, ids, view).flatten(0, 1)
    some = run(transformer, ids, view, wanted=torch.tensor(wanted, dtype=torch.int64))
    assert some.dtype == torch.float32
    same(some, every[wanted])


@given(family=FAMILIES)
def test_embeddings_replace_tokens(family: str) -> None:
    transformer, ids = MODELS[family], tokens(2)
    view = window(0, 0, width=LENGTH, visible=LENGTH)
    given_instead = run(transformer, ids * 0, view, embeddings=transformer.embed(ids))
    assert torch.equal(given_instead, run(transformer, ids, view))


@given(block=BLOCKS, start=st.integers(0, 12), width=st.integers(1, 12), reach=st.integers(0, 12))
def test_the_mask_follows_the_window(block: int, start: int, width: int, reach: int) -> None:
    transformer, visible = MODELS["llada2"], min(LENGTH, start + width + reach)
    spec, cache = transformer.spec, cache_for(transformer, 1)
    view = window(start, width=width, visible=visible, block=block)
    seen = AttentionMetadata.of(view, cache, spec.attention[0], torch.device("cpu"))
    for query in range(width):
        stop = min(visible, ((start + query) // block + 1) * block)
        allowed = [key < stop for key in range(seen.queries.kv_length)]
        mask = (
            torch.ones(1, width, seen.queries.kv_length, dtype=torch.bool)
            if seen.mask is None
            else seen.mask
        )
        assert mask[0, query].tolist() == allowed


def test_importance_is_computed_only_for_policies_that_need_it() -> None:
    plain = TensorRecorder()
    run(MODELS["llada2"], tokens(1), window(0, width=LENGTH, visible=LENGTH), recorder=plain)
    assert all(scores.importance is None for _, scores, _ in plain.routings)


@given(block=st.sampled_from([0, 4]), start=st.sampled_from([0, 8]))
def test_importance_is_attention_received_times_what_enters(block: int, start: int) -> None:
    transformer, ids, trace = MODELS["llada-moe"], tokens(2), TensorRecorder()
    cache = cache_for(transformer, 2)
    run(transformer, ids, window(0, 0, width=LENGTH, visible=LENGTH, block=block), cache)
    view = window(start, start, width=16, visible=LENGTH, block=block)
    policy = parse_policy("mc-moe:beta=0.6,protect=0.02")
    run(transformer, ids[:, start : start + 16], view, cache, policy=policy, recorder=trace)
    entering = dict(trace.outputs)
    for layer, scores, _ in trace.routings:
        received = attention_received(transformer, layer, entering[layer - 1], view, cache)
        expected = received * entering[layer - 1].abs().sum(-1)
        assert scores.importance is not None
        same(scores.importance, expected)


def attention_received(
    transformer: Transformer, layer: int, x: Tensor, view: Window, cache: KVCache
) -> Tensor:
    """The definition, position by position: mean over heads and queries, [B, W]."""
    spec, attention = transformer.spec, transformer.layers[layer].attention
    norm = transformer.layers[layer].attention_norm
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm_epsilon) * norm
    seen = AttentionMetadata.of(view, cache, spec.attention[0], x.device)
    heads = (normed @ attention.qkv.T).unflatten(-1, (-1, spec.head_dim))
    query, _, _ = attention._split_heads(heads, seen.queries)
    received = torch.zeros(x.shape[:2])
    for row in range(x.shape[0]):
        for at in range(view.width):
            for head in range(spec.heads):
                keys = cache.keys[layer][row, head * spec.kv_heads // spec.heads]
                scores = keys @ query[row, at, head] / spec.head_dim**0.5
                position = int(view.start[row]) + at
                stop = (position // view.block + 1) * view.block if view.block else LENGTH
                share = scores[:stop].softmax(-1)
                for key in range(view.width):
                    place = int(view.start[row]) + key
                    if place < stop:
                        received[row, key] += share[place] / (view.width * spec.heads)
    return received


def test_the_recorder_sees_embeddings_every_layer_and_what_the_head_reads() -> None:
    transformer, ids, trace = MODELS["llada2"], tokens(1), TensorRecorder()
    logits = run(transformer, ids, window(0, width=LENGTH, visible=LENGTH), recorder=trace)
    assert [layer for layer, _ in trace.outputs] == [-1, 0, 1, 2, 3]
    assert torch.equal(trace.outputs[0][1], transformer.embed(ids))
    assert torch.equal(trace.outputs[-1][1] @ transformer.head.T, logits[0])
    assert [layer for layer, _, _ in trace.routings] == [1, 2]


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_half_precision_stays_near_full_precision(family: str) -> None:
    transformer, ids = MODELS[family], tokens(1)
    view = window(0, width=LENGTH, visible=LENGTH)
    full = run(transformer, ids, view)
    half = run(random_transformer(transformer.spec, 7, dtype=torch.bfloat16), ids, view)
    assert half.dtype == torch.float32
    assert float((half - full).norm() / full.norm()) < 0.15


@given(prompt=st.integers(1, 12), width=st.integers(1, 8))
def test_an_encoder_replaces_the_keys_that_a_decoder_wrote(prompt: int, width: int) -> None:
    transformer, ids = MODELS["diffusion-gemma"], tokens(1)[:, : prompt + width]
    caches = [cache_for(transformer, 1, prompt + width) for _ in range(2)]
    spans = [[(0, prompt + width)], [(0, prompt), (prompt, prompt + width)]]
    decoded = window(prompt, width=width, visible=prompt + width)
    with torch.inference_mode():
        transformer(ids[:, prompt:], ForwardContext(decoded, caches[1], Vanilla()))
        for cache, parts in zip(caches, spans, strict=True):
            for start, stop in parts:
                view = window(start, width=stop - start, visible=stop, block=1)
                context = ForwardContext(view, cache, Vanilla(), encodes=True)
                transformer(ids[:, start:stop], context)
    for kept in ("keys", "values"):
        for left, right in zip(*(getattr(cache, kept) for cache in caches), strict=True):
            same(left, right)


@given(
    starts=st.lists(st.integers(0, 16), min_size=1, max_size=3),
    width=st.integers(1, 8),
    block=st.sampled_from([0, 1, 4]),
)
def test_a_sliding_window_ends_before_the_block(starts: list[int], width: int, block: int) -> None:
    """The kept keys and the mask of them, as the definition has it for each query."""
    transformer = MODELS["diffusion-gemma"]
    kind, visible = transformer.spec.attention[0], [start + width for start in starts]
    cache = cache_for(transformer, len(starts), LENGTH)
    view = window(*starts, width=width, visible=visible, block=block)
    seen = AttentionMetadata.of(view, cache, kind, torch.device("cpu"))
    assert kind.window
    assert seen.first_key <= max(0, min(starts) - kind.window + 1)
    for row, start in enumerate(starts):
        for query in range(start, start + width):
            own = query // block * block if block else start
            stop = min(visible[row], (query // block + 1) * block) if block else visible[row]
            keys = range(max(0, own - kind.window + 1), stop)
            mask = [True] * (seen.queries.kv_length - seen.first_key)
            if seen.mask is not None:
                mask = seen.mask[row, query - start].tolist()
            assert [seen.first_key + key for key, sees in enumerate(mask) if sees] == [*keys]


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_queries_that_attend_in_parts_see_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, view = tokens(2), window(0, 0, width=LENGTH, visible=[LENGTH, LENGTH - 5], block=4)
    whole = run(MODELS[family], ids, view)
    monkeypatch.setattr(attention, "QUERIES_PER_PART", 5)
    same(run(MODELS[family], ids, view), whole)


def test_one_canvas_needs_no_mask_of_its_window() -> None:
    transformer = MODELS["diffusion-gemma"]
    kind, cache = transformer.spec.attention[0], cache_for(transformer, 1)
    view = window(16, width=8, visible=LENGTH)
    seen = AttentionMetadata.of(view, cache, kind, torch.device("cpu"))
    assert (seen.mask, seen.first_key) == (None, 16 - kind.window + 1)
