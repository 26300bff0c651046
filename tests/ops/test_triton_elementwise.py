"""What surrounds the experts, by kernels for a GPU: equal by value to plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.model.attention import Attention, AttentionMetadata
from coterie.model.cache import KVCache
from coterie.ops import reference
from coterie.testing import read_spec, tiny_config
from coterie.values import Window

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SPEC = read_spec(tiny_config("llada2"))[1]


@settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 999),
    dtype=st.sampled_from(tuple(NEAR)),
    heads=st.tuples(st.integers(1, 2), st.sampled_from((1, 3, 4)), st.sampled_from((8, 24, 64))),
    rows=st.integers(1, 2),
    width=st.sampled_from((1, 5, 16)),
    before=st.sampled_from((0, 3, 70)),
    causal=st.sampled_from((0, 4)),
    gathered=st.booleans(),
)
def test_attention_equals_plain_torch(
    *,
    seed: int,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    rows: int,
    width: int,
    before: int,
    causal: int,
    gathered: bool,
) -> None:
    (kv_heads, shared, dim), draw = heads, torch.Generator().manual_seed(seed)
    start = torch.randint(0, before + 1, (rows,), generator=draw)
    seen = start + width + torch.randint(0, 3, (rows,), generator=draw)
    window = Window(start, width, seen, causal)
    attention = random_attention(kv_heads, shared, dim, draw)
    agree(attention, window, before + width + 3, dtype, draw, gathered=gathered)


def test_keys_are_split_among_programs() -> None:
    draw = torch.Generator().manual_seed(1)
    window = Window(torch.tensor([650]), 4, torch.tensor([654]))
    agree(random_attention(2, 4, 64, draw), window, 700, torch.bfloat16, draw)


def test_masked_keys_have_no_effect() -> None:
    from coterie.ops.triton import attention as kernels

    draw = torch.Generator().manual_seed(2)
    attention, dim = random_attention(2, 2, 16, draw), 16
    window = Window(torch.tensor([10, 70]), 4, torch.tensor([14, 74]))
    cache = filled(attention, 2, 80, torch.float32, draw)
    qkv = torch.randn(2, 4, 8, dim, generator=draw).to(DEVICE)
    sight = AttentionMetadata.of(
        window, cache, attention.spec.attention[0], torch.device(DEVICE)
    ).queries
    both = []
    for hidden in (0.0, 1e30):
        for held in (*cache.keys, *cache.values):
            held[0, :, 14:], held[1, :, 74:] = hidden, hidden
        norms = (attention.query_norm, attention.key_norm)
        both.append(kernels.fused_attention(qkv, norms, sight, cache.layer_kv(0, 2), 1e-6))
    assert torch.equal(*both)
    assert bool(both[0].isfinite().all())


@settings(max_examples=7, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 999),
    dtype=st.sampled_from(tuple(NEAR)),
    rows=st.integers(1, 5),
    size=st.sampled_from((1, 7, 64, 200)),
)
def test_rows_equal_plain_torch(seed: int, dtype: torch.dtype, rows: int, size: int) -> None:
    from coterie.ops.triton import elementwise as kernels

    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, rows, size, generator=draw) * 3).to(DEVICE, dtype)
    weight = torch.randn(size, generator=draw).to(DEVICE, dtype)
    close(kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    both = torch.randn(rows, 2 * size, generator=draw).to(DEVICE, dtype)
    close(kernels.silu_and_mul(both), reference.activate_and_mul(both, "silu"))


@settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 3),
    size=st.sampled_from((2, 96, 4096, 4097, 9000)),
    ties=st.booleans(),
)
def test_logits_summary_equals_plain_torch(seed: int, rows: int, size: int, ties: bool) -> None:
    from coterie.ops.triton import elementwise as kernels

    draw = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, size, generator=draw) * 3).to(DEVICE)
    logits = logits.round() if ties else logits
    mask = int(torch.randint(0, size, (), generator=draw))
    logits[0, mask] = 50.0
    found, expected = (
        kernels.summarize_logits(logits, mask),
        reference.summarize_logits(logits.cpu(), mask),
    )
    assert found.argmax.tolist() == expected.argmax.tolist()
    assert found.unmasked_argmax.tolist() == expected.unmasked_argmax.tolist()
    assert torch.allclose(found.logsumexp.cpu(), expected.logsumexp, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
def test_logits_summary_marks_non_finite_logits() -> None:
    from coterie.ops.triton import elementwise as kernels

    logits = torch.zeros(5, 5000, device=DEVICE)
    logits[1, 7], logits[2, 4990], logits[3, 0] = torch.nan, torch.inf, -torch.inf
    logits[4] = torch.nan
    found = kernels.summarize_logits(logits, 3)
    assert found.logsumexp.isfinite().tolist() == [True, False, False, False, False]
    for ids in (found.argmax, found.unmasked_argmax):
        assert bool(((ids >= 0) & (ids < 5000)).all())


def random_attention(kv_heads: int, shared: int, dim: int, draw: torch.Generator) -> Attention:
    """Of width 24, in fp32."""
    turning = 2 * int(torch.randint(1, dim // 2 + 1, (), generator=draw))
    spec = replace(
        SPEC,
        layers=1,
        hidden=24,
        heads=kv_heads * shared,
        kv_heads=kv_heads,
        head_dim=dim,
        rotary_dim=turning,
    )

    def some(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) * 0.3).to(DEVICE)

    norms = {name: 1 + some(dim) for name in ("query_norm", "key_norm")}
    return Attention(
        spec, 0, qkv=some(spec.qkv_rows(0), 24), out=some(24, spec.heads * dim), **norms
    )


def filled(
    attention: Attention, rows: int, length: int, dtype: torch.dtype, draw: torch.Generator
) -> KVCache:
    """A cache that holds something everywhere."""
    shape = (rows, attention.spec.kv_heads, length, attention.spec.head_dim)
    keys, values = (torch.randn(shape, generator=draw).to(DEVICE, dtype) for _ in range(2))
    return KVCache((keys,), (values,))


def agree(
    attention: Attention,
    window: Window,
    length: int,
    dtype: torch.dtype,
    draw: torch.Generator,
    *,
    gathered: bool = False,
) -> None:
    """The kernels in ``dtype`` against plain torch in fp32: what is mixed, and what is kept."""
    from coterie.ops.triton import attention as kernels

    spec, rows = attention.spec, len(window.start)
    qkv = torch.randn(rows, window.width, spec.qkv_rows(0) // spec.head_dim, spec.head_dim)
    qkv = qkv.normal_(generator=draw).to(DEVICE, dtype)
    whole = filled(attention, rows + 1, length, dtype, draw)
    order = [rows, *range(rows - 1)] if gathered else list(range(rows))
    ours = whole.select_rows(order)
    wide = KVCache((whole.keys[0].float(),), (whole.values[0].float(),)).select_rows(order)
    norms = tuple(norm.to(dtype) for norm in (attention.query_norm, attention.key_norm))
    view = AttentionMetadata.of(window, ours, spec.attention[0], torch.device(DEVICE))
    assert kernels.supports_attention(qkv, ours.layer_kv(0, rows))
    found = kernels.fused_attention(
        qkv, norms, view.queries, ours.layer_kv(0, rows), spec.norm_epsilon
    )
    plain = replace(
        attention,
        query_norm=norms[0].float(),
        key_norm=norms[1].float(),
        qkv=torch.eye(spec.qkv_rows(0), device=DEVICE),
        out=torch.eye(spec.heads * spec.head_dim, device=DEVICE),
    )
    expected, _ = plain(qkv.float().flatten(2), view, wide)
    close(found.flatten(2), expected, NEAR[dtype])
    close(ours.keys[0], wide.keys[0], NEAR[dtype])
    close(ours.values[0], wide.values[0], NEAR[dtype])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
def test_a_row_whose_square_overflows_becomes_nan() -> None:
    from coterie.ops.triton import elementwise as kernels

    x = torch.full((2, 40), 1e25, device=DEVICE)
    x[1] = 1.0
    found = kernels.rms_norm(x, torch.ones(40, device=DEVICE), 1e-6)
    assert found.isfinite().all(dim=1).tolist() == [False, True]


def close(found: Tensor, expected: Tensor, near: float | None = None) -> None:
    """Distance over size."""
    near = NEAR[found.dtype] if near is None else near
    assert found.shape == expected.shape
    distance = (found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-9)
    assert float(distance) <= near, float(distance)
