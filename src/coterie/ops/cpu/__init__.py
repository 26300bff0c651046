"""Experts on a CPU, at the speed of its memory: weights packed once, read as one stream.

The kernels are C++ behind a plain C interface. Where they were not built nothing is packed, and
PyTorch does the work.
"""

from coterie.ops.cpu.attend import fused_attention, supports_attention, fused_attention_layer
from coterie.ops.cpu.checksum import crc32
from coterie.ops.cpu.kernels import (
    expert_bytes,
    available_isas,
    allocate,
    pack,
    packed_format,
    read_experts,
    is_available,
    run_experts,
)
from coterie.ops.cpu.linear import linear, pack_matrix, can_pack_matrix, swiglu
from coterie.ops.cpu.route import route
from coterie.ops.cpu.rows import (
    add_rms_norm,
    supports_rms_norm,
    rms_norm,
    summarize_logits,
    supports_logits_summary,
)

__all__ = [
    "add_rms_norm",
    "fused_attention",
    "supports_attention",
    "fused_attention_layer",
    "crc32",
    "expert_bytes",
    "available_isas",
    "linear",
    "allocate",
    "supports_rms_norm",
    "pack",
    "pack_matrix",
    "packed_format",
    "can_pack_matrix",
    "read_experts",
    "is_available",
    "rms_norm",
    "route",
    "run_experts",
    "summarize_logits",
    "supports_logits_summary",
    "swiglu",
]
