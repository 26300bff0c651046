"""Every kernel for a GPU compiles and spills few registers or none; see ``gpu_compilation``."""

from __future__ import annotations

import pytest
from gpu_compilation import compiled_parts
from test_triton_experts import LAUNCHES as EXPERTS
from test_triton_routing_launches import LAUNCHES as ROUTING

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")

LAYERS = EXPERTS.replace("DTYPE", "torch.bfloat16")
FEW_LAYERS = """
for form in (None, FORMATS["int4"]):
    run(32, layer(2048, 512, form))
"""
MORE_LAYERS = """
for tokens in (16, 64):
    run(tokens, layer(2048, 512, None))
run(32, layer(2048, 512, FORMATS["int8"]))
for element in (torch.bfloat16, *FORMATS.values()):
    run(32, in_blobs(47, ExpertLayout(2048, 512, element)))
"""
WEIGHTS = """
from coterie.ops.triton import vote_weights
"""
FEW_VOTES = """
go(blocks, 32, CoresetRule(count=38))
vote_weights(torch.ones(1, 32), torch.ones(1, 32, dtype=torch.bool), invert_filter=True)
"""
MORE_VOTES = """
go(mini, 32, None)
go(mini, 32, CoresetRule(count=38))
vote_weights(None, torch.ones(1, 256))
"""
ATTENTION = """
import torch
from coterie.ops import triton
from coterie.values import LayerKV, QueryPositions

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def attend(dtype, count, kv_heads, length):
    angles = meta(count, 32, 1, 32, dtype=torch.float32)
    positions = meta(count, 32, dtype=torch.int64)
    kv = [meta(count, kv_heads, length, 128, dtype=dtype) for _ in range(2)]
    triton.fused_attention(
        meta(count, 32, 16 + 2 * kv_heads, 128, dtype=dtype),
        (meta(128, dtype=dtype), meta(128, dtype=dtype)),
        QueryPositions(positions, positions, length, angles, angles),
        LayerKV(*kv, meta(count, dtype=torch.int64)),
        1e-6,
    )
"""
FEW_ROWS = """
attend(torch.bfloat16, 1, 4, 1280)
triton.rms_norm(meta(32, 2048), meta(2048), 1e-6)
triton.silu_and_mul(meta(32, 1024))
triton.summarize_logits(meta(32, 157184, dtype=torch.float32), 3)
"""
DISPATCH = """
import torch
from coterie.ops.triton import dispatch
from coterie.values import Routing

def lists(tokens, k, experts):
    ids = torch.zeros(tokens, k, dtype=torch.int64)
    used = torch.zeros(experts, dtype=torch.bool)
    dispatch(Routing(ids, ids.float(), used, ids), torch.arange(experts), experts)
"""
FEW = (
    LAYERS + FEW_LAYERS,
    ROUTING + WEIGHTS + FEW_VOTES,
    ATTENTION + FEW_ROWS,
    DISPATCH + "lists(32, 8, 256)",
)
MORE = (
    LAYERS + MORE_LAYERS,
    ROUTING + WEIGHTS + MORE_VOTES,
    ATTENTION + "attend(torch.float32, 4, 16, 256)",
    DISPATCH + "lists(512, 8, 256)\nlists(1, 2, 8)\nlists(32, 8, 96)",
)
ROUTES, VOTE_WEIGHTS = ["vote_kernel", "choose_kernel"], "_vote_weights_kernel"


@pytest.mark.parametrize(
    ("codes", "products", "routes", "rows", "lists"),
    [
        pytest.param(FEW, 4, ["admit_kernel", *ROUTES, VOTE_WEIGHTS], 4, 1, id="few"),
        pytest.param(
            MORE, 12, [*ROUTES, *ROUTES, VOTE_WEIGHTS], 1, 3, id="more", marks=pytest.mark.slow
        ),
    ],
)
def test_the_kernels_compile_for_a_gpu(
    codes: tuple[str, ...], products: int, routes: list[str], rows: int, lists: int
) -> None:
    experts, routing, attention, dispatch = compiled_parts(codes)
    gemms = [kernel for kernel in experts if kernel.name == "product_kernel"]
    assert len(gemms) == products
    assert [kernel.name for kernel in routing] == routes
    assert len(attention) >= rows
    assert len(dispatch) == lists
    assert [kernel for kernel in (*experts, *attention) if kernel.stack > 0] == []
    assert [kernel for kernel in (*routing, *dispatch) if kernel.stack > 16] == []
    # Two programs fit a processor.
    assert max(kernel.shared for kernel in (*experts, *attention)) <= 113 << 10
