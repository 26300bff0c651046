"""CPU kernels: weights are packed once and streamed at the speed of memory.

The kernels are C++ behind a C interface. If they are not built, nothing is packed and PyTorch
computes everything.
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
from coterie.ops.cpu.experts import allocate, pack, packed_format, read_experts, run_experts
from coterie.ops.cpu.library import available_isas, is_available
from coterie.ops.cpu.linear import can_pack_matrix, linear, pack_matrix, swiglu
from coterie.ops.cpu.routing import route

__all__ = [
    "add_rms_norm",
    "allocate",
    "available_isas",
    "can_pack_matrix",
    "crc32",
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
