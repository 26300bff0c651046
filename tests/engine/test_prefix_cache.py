"""The prefix cache: blocks leave by age, never before their successors, and within the budget."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.decoding import parse_kv_scheme
from coterie.engine.prefix_cache import PrefixBlockCache, PrefixLayout
from coterie.model.cache import KVCache
from coterie.values import RouterSpec

BLOCK_BYTES = 16
ROUTER = RouterSpec(16, 4, "softmax", renormalise=True)


def block(value: float) -> KVCache:
    """Two keys and two values of one number."""
    keys, values = torch.full((2, 1, 1, 2, 1), float(value))
    return KVCache((keys,), (values,))


def path(steps: list[int]) -> list[bytes]:
    """The digests of a prefix: a block's digest names the blocks before it."""
    return [bytes(steps[: count + 1]) for count in range(len(steps))]


prefixes = st.lists(st.integers(0, 2), min_size=1, max_size=5)
uses = st.lists(st.tuples(st.booleans(), prefixes), max_size=20)


@given(uses, st.integers(0, 7 * BLOCK_BYTES))
def test_a_cache_keeps_whole_prefixes_of_the_latest_use(
    uses: list[tuple[bool, list[int]]], capacity: int
) -> None:
    cache = PrefixBlockCache(capacity)
    for stores, steps in uses:
        digests = path(steps)
        if stores:
            cache.store(digests, BLOCK_BYTES, block)
            kept = min(len(digests), capacity // BLOCK_BYTES)
            assert len(cache.find(digests)) == kept
        found = cache.find(digests)
        assert [float(each.keys[0].flatten()[0]) for each in found] == list(range(len(found)))
        stats = cache.stats
        assert stats.bytes == stats.entries * BLOCK_BYTES <= capacity
        cached = set(cache._blocks)
        assert all(digest[:-1] in cached for digest in cached if len(digest) > 1)


@given(st.lists(prefixes, min_size=2, max_size=6))
def test_the_least_recently_used_prefix_leaves(prefixes: list[list[int]]) -> None:
    heads = [[index, *steps] for index, steps in enumerate(prefixes)]  # no two share a block
    size = sum(map(len, heads)) * BLOCK_BYTES
    cache = PrefixBlockCache(size)
    for steps in heads:
        cache.store(path(steps), BLOCK_BYTES, block)
    cache.find(path(heads[0]))
    cache.store(path([99]), BLOCK_BYTES, block)
    lost = [steps for steps in heads if len(cache.find(path(steps))) < len(steps)]
    assert lost == [heads[1]]


def test_hits_and_tokens_are_counted() -> None:
    cache = PrefixBlockCache(100 * BLOCK_BYTES)
    cache.find(path([1]))
    cache.store(path([1, 2]), BLOCK_BYTES, block)
    cache.find(path([1, 2, 3]))
    cache.find(path([1, 0]))
    assert (cache.stats.hits, cache.stats.tokens, cache.stats.entries) == (2, 6, 2)


tokens = st.lists(st.integers(0, 3), max_size=12).map(lambda ids: torch.tensor(ids).long())


@given(tokens, tokens, st.integers(1, 4))
def test_digests_are_equal_where_all_tokens_before_are(a: Tensor, b: Tensor, width: int) -> None:
    layout = PrefixLayout.of(parse_kv_scheme("block-causal"), width, ROUTER)
    both = zip(layout.digests(a), layout.digests(b), strict=False)
    assert len(layout.digests(a)) == len(a) // width
    for index, (one, other) in enumerate(both):
        stop = (index + 1) * width
        assert (one == other) == torch.equal(a[:stop], b[:stop])


def test_layouts_share_no_digest() -> None:
    ids = torch.arange(24)
    kv_schemes = [
        (kv_scheme, width) for kv_scheme in ("block-causal", "encoder") for width in (4, 8)
    ]
    layouts = [
        PrefixLayout.of(parse_kv_scheme(kv_scheme), width, ROUTER)
        for kv_scheme, width in kv_schemes
    ]
    digests = [digest for layout in layouts for digest in layout.digests(ids)]
    assert len(set(digests)) == len(digests) == 2 * (6 + 3)
