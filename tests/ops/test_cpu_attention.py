"""Attention by one kernel against plain torch in fp32: every instruction set, forced."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie import ops
from coterie.model.attention import Attention, AttentionMetadata
from coterie.model.cache import KVCache
from coterie.ops import cpu
from coterie.testing import read_spec, tiny_config
from coterie.values import Window

NEAR = 1e-2
"""Of the output's norm: a handful of roundings to bf16, where plain torch rounds nothing."""
ALONE = 4e-2
"""The same of few numbers."""
HIDDEN = 24
SPEC = read_spec(tiny_config("llada2"))[1]

if not cpu.is_available():
    pytest.skip("NOT TESTED: the kernels for CPUs are not built", allow_module_level=True)

ISAS = cpu.available_isas()


@given(
    seed=st.integers(0, 999),
    isa=st.sampled_from(ISAS),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 4),
    half=st.integers(1, 35),
    rows=st.integers(1, 3),
    width=st.integers(1, 40),
    before=st.integers(0, 70),
    after=st.integers(0, 30),
    causal=st.integers(0, 8),
    cached=st.sampled_from(("rows", "gathered", "nothing")),
    threads=st.integers(1, 3),
    packed=st.booleans(),
)
@law(150)
def test_attention_equals_plain_torch(
    *,
    seed: int,
    isa: str,
    kv_heads: int,
    shared: int,
    half: int,
    rows: int,
    width: int,
    before: int,
    after: int,
    causal: int,
    cached: str,
    threads: int,
    packed: bool,
):
    case = Case(seed, kv_heads, shared, dim=2 * half)
    if cached == "nothing":
        window = Window(torch.zeros(rows, dtype=torch.int64), width, torch.full((rows,), width))
    else:
        start = torch.randint(0, before + 1, (rows,), generator=case.draw)
        seen = start + width + torch.randint(0, after + 1, (rows,), generator=case.draw)
        window = Window(start, width, seen, causal)
    length = None if cached == "nothing" else before + width + after
    if packed:  # then the products before and after it are of the same call
        case.pack()
    assert case.error(window, length, isa, gathered=cached == "gathered", threads=threads) < ALONE


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_over_many_keys(isa: str, dim: int):
    case = Case(0, kv_heads=2, shared=4, dim=dim)
    window = Window(torch.tensor([2100]), 32, torch.tensor([2132]))
    assert case.error(window, 2150, isa) < NEAR


def test_a_long_prompt_with_a_block_causal_mask():
    case = Case(1, kv_heads=2, shared=2, dim=64)
    window = Window(torch.tensor([0]), 1500, torch.tensor([1500]), block=32)
    assert case.error(window, 1600, ISAS[-1]) < NEAR


def test_threads_do_not_change_a_bit():
    case = Case(2, kv_heads=3, shared=2, dim=48)
    case.pack()
    window = Window(torch.tensor([5, 9]), 33, torch.tensor([38, 60]), block=4)
    first, cache = case.run(window, 60, ISAS[-1], threads=1)
    for threads in (2, 3, 7):
        found, _ = case.run(window, 60, ISAS[-1], cache, threads=threads)
        assert torch.equal(found, first)


def test_masked_keys_have_no_effect():
    case = Case(3, kv_heads=2, shared=2, dim=32)
    window = Window(torch.tensor([10, 40]), 8, torch.tensor([18, 48]))
    found, cache = case.run(window, 64, ISAS[-1])
    for held in (*cache.keys, *cache.values):
        held[0, :, 18:] = 1e30
        held[1, :, 48:] = 1e30
    again, _ = case.run(window, 64, ISAS[-1], cache)
    assert torch.equal(found, again)


def test_nan_propagates():
    case = Case(4, kv_heads=2, shared=2, dim=32)
    window = Window(torch.tensor([3, 3]), 8, torch.tensor([11, 11]))
    case.x = case.inputs(window)
    case.x[1, 2, 5] = torch.nan
    found, _ = case.run(window, 20, ISAS[-1])
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_other_dtypes_are_not_supported():
    case = Case(5, kv_heads=1, shared=1, dim=8)
    window = Window(torch.tensor([0]), 4, torch.tensor([4]))
    heads = torch.zeros(1, 4, 3, 8)
    cache = KVCache.allocate(case.spec, 1, 4, dtype=torch.float32)
    sight = AttentionMetadata.of(window, cache, case.spec.attention[0], torch.device("cpu")).queries
    assert (
        ops.fused_attention(heads, (case.norm, case.norm), sight, cache.layer_kv(0, 1), 1e-6)
        is None
    )


class Case:
    """Random weights of one attention: what it makes of a window, and what it should."""

    def __init__(self, seed: int, kv_heads: int, shared: int, *, dim: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.spec = replace(
            SPEC,
            layers=1,
            hidden=HIDDEN,
            heads=kv_heads * shared,
            kv_heads=kv_heads,
            head_dim=dim,
            rotary_dim=2 * int(torch.randint(1, dim // 2 + 1, (), generator=self.draw)),
        )
        self.norm = torch.ones(dim).bfloat16()
        self.x: Tensor | None = None
        self.plain = self.attention = Attention(
            self.spec,
            0,
            qkv=self._half(self.spec.qkv_rows(0), HIDDEN) * 0.3,
            out=self._half(HIDDEN, kv_heads * shared * dim) * 0.1,
            query_norm=self.norm + self._half(dim) * 0.1,
            key_norm=self.norm + self._half(dim) * 0.1,
        )

    def pack(self) -> None:
        """From now on its matrices are packed."""
        qkv, out = self.plain.qkv, self.plain.out
        assert isinstance(qkv, Tensor)
        assert isinstance(out, Tensor)
        packed = {"qkv": ops.prepare_matrix(qkv), "out": ops.prepare_matrix(out)}
        self.attention = replace(self.plain, **packed)

    def _half(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).bfloat16()

    def inputs(self, window: Window) -> Tensor:
        if self.x is None:
            self.x = self._half(len(window.start), window.width, HIDDEN)
        return self.x

    def cache(self, rows: int, length: int) -> KVCache:
        shape = (rows, self.spec.kv_heads, length, self.spec.head_dim)
        return KVCache((self._half(*shape),), (self._half(*shape),))

    def run(
        self,
        window: Window,
        length: int,
        isa: str,
        cache: KVCache | None = None,
        *,
        threads: int = 2,
    ) -> tuple[Tensor, KVCache]:
        """The output, and the cache afterwards."""
        cache = cache or self.cache(len(window.start), length)
        return forced(
            self.attention, self.inputs(window), window, cache, isa=isa, threads=threads
        ), cache

    def error(
        self,
        window: Window,
        length: int | None,
        isa: str,
        *,
        gathered: bool = False,
        threads: int = 2,
    ) -> float:
        """Of the output or of what it writes, whichever is greater."""
        x, rows = self.inputs(window), len(window.start)
        half = full = None
        if length is not None:
            whole = self.cache(rows + 1, length)
            order = [rows, *range(rows - 1)] if gathered else list(range(rows))
            half = whole.select_rows(order)
            full = KVCache((whole.keys[0].float(),), (whole.values[0].float(),)).select_rows(order)
        found = forced(self.attention, x, window, half, isa=isa, threads=threads)
        parts = ("qkv", "out", "query_norm", "key_norm")
        wide = {part: getattr(self.plain, part).float() for part in parts}
        view = AttentionMetadata.of(window, full, self.spec.attention[0], torch.device("cpu"))
        expected, _ = replace(self.plain, **wide)(x.float(), view, full)
        pairs = [(found, expected)]
        if half is not None and full is not None:
            pairs += [(half.keys[0], full.keys[0]), (half.values[0], full.values[0])]
        return max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)


def forced(
    attention: Attention,
    x: Tensor,
    window: Window,
    cache: KVCache | None,
    *,
    isa: str,
    threads: int,
) -> Tensor:
    before, chosen = torch.get_num_threads(), os.environ.get("COTERIE_ISA")
    torch.set_num_threads(threads)
    os.environ["COTERIE_ISA"] = isa
    try:
        return attention(
            x, AttentionMetadata.of(window, cache, attention.spec.attention[0], x.device), cache
        )[0]
    finally:
        torch.set_num_threads(before)
        os.environ.pop("COTERIE_ISA")
        if chosen is not None:
            os.environ["COTERIE_ISA"] = chosen
