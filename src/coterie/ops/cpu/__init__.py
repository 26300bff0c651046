"""Experts on a CPU, at the speed of its memory: weights packed once, read as one stream.

The kernels are C++ behind a plain C interface. Where they were not built nothing is packed, and
PyTorch does the work.
"""

from coterie.ops.cpu.attention import fused_attention, fused_attention_layer, supports_attention
from coterie.ops.cpu.checksum import crc32
from coterie.ops.cpu.elementwise import (
    add_rms_norm,
    rms_norm,
    summarize_logits,
    supports_logits_summary,
    supports_rms_norm,
)
from coterie.ops.cpu.experts import (
    allocate,
    available_isas,
    expert_bytes,
    is_available,
    pack,
    packed_format,
    read_experts,
    run_experts,
)
from coterie.ops.cpu.linear import can_pack_matrix, linear, pack_matrix, swiglu
from coterie.ops.cpu.routing import route

__all__ = [
    "add_rms_norm",
    "allocate",
    "available_isas",
    "can_pack_matrix",
    "crc32",
    "expert_bytes",
    "fused_attention",
    "fused_attention_layer",
    "is_available",
    "linear",
    "pack",
    "pack_matrix",
    "packed_format",
    "read_experts",
    "rms_norm",
    "route",
    "run_experts",
    "summarize_logits",
    "supports_attention",
    "supports_logits_summary",
    "supports_rms_norm",
    "swiglu",
]
