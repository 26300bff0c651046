"""Every kernel for a GPU compiles and spills few registers or none; see ``gpu_compilation``."""

from __future__ import annotations

import pytest
from gpu_compilation import compiled_parts
from test_triton_experts import LAUNCHES as EXPERTS
from test_triton_routing_launches import LAUNCHES as ROUTING

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")

EXPERT_FORMATS = (
    EXPERTS.replace("DTYPE", "torch.bfloat16")
    + """
few = ((form, 32) for form in FORMATS.values())
for form, tokens in ((None, 16), (None, 32), (None, 64), *few):
    run(tokens, layer(2048, 512, form))
for element in (torch.bfloat16, *FORMATS.values()):
    run(32, in_blobs(47, ExpertLayout(2048, 512, element)))
"""
)
VOTES = (
    ROUTING
    + """
from coterie.ops.triton import vote_weights

go(mini, 32, None)
go(mini, 32, CoresetRule(count=38))
go(blocks, 32, CoresetRule(count=38))
vote_weights(torch.ones(1, 32), torch.ones(1, 32, dtype=torch.bool), invert_filter=True)
vote_weights(None, torch.ones(1, 256))
"""
)
ATTENTION = """
import torch
from coterie.ops import triton
from coterie.values import LayerKV, QueryPositions

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

for dtype, count, kv_heads, length in ((torch.bfloat16, 1, 4, 1280), (torch.float32, 4, 16, 256)):
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
triton.rms_norm(meta(32, 2048), meta(2048), 1e-6)
triton.silu_and_mul(meta(32, 1024))
triton.summarize_logits(meta(32, 157184, dtype=torch.float32), 3)
"""
DISPATCH = """
import torch
from coterie.ops.triton import dispatch
from coterie.values import Routing

for tokens, k, experts in ((32, 8, 256), (512, 8, 256), (1, 2, 8), (32, 8, 96)):
    ids = torch.zeros(tokens, k, dtype=torch.int64)
    used = torch.zeros(experts, dtype=torch.bool)
    dispatch(Routing(ids, ids.float(), used, ids), torch.arange(experts), experts)
"""


def test_the_kernels_compile_for_a_gpu() -> None:
    codes = (EXPERT_FORMATS, VOTES, ATTENTION, DISPATCH)
    experts, routing, attention, dispatch = compiled_parts(codes)
    gemms = [kernel for kernel in experts if kernel.name == "product_kernel"]
    assert len(gemms) == 16
    assert [kernel.name for kernel in routing] == [
        *["vote_kernel", "choose_kernel"] * 2,
        *["admit_kernel", "vote_kernel", "choose_kernel"],
        *["_vote_weights_kernel"] * 2,
    ]
    assert len(attention) >= 6
    assert len(dispatch) == 4
    assert [kernel for kernel in (*experts, *attention) if kernel.stack > 0] == []
    assert [kernel for kernel in (*routing, *dispatch) if kernel.stack > 16] == []
    # Two programs fit a processor.
    assert max(kernel.shared for kernel in (*experts, *attention)) <= 113 << 10
