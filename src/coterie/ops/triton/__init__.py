"""GPU kernels in Triton; imported when the first tensor on a GPU arrives.

Set TRITON_INTERPRET=1 before any import to run them without a GPU, in Triton's interpreter.
"""

from coterie.ops.triton.attention import fused_attention, supports_attention
from coterie.ops.triton.dispatch import dispatch
from coterie.ops.triton.elementwise import (
    rms_norm,
    silu_and_mul,
    summarize_logits,
    supports_rms_norm,
)
from coterie.ops.triton.experts import run_experts, supports_experts
from coterie.ops.triton.routing import route
from coterie.ops.triton.vote_weights import vote_weights

__all__ = [
    "dispatch",
    "fused_attention",
    "rms_norm",
    "route",
    "run_experts",
    "silu_and_mul",
    "summarize_logits",
    "supports_attention",
    "supports_experts",
    "supports_rms_norm",
    "vote_weights",
]
