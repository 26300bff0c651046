"""Experts on a CPU, at the speed of its memory: weights packed once, read as one stream.

The kernels are C++ behind a plain C interface. Where they were not built nothing is packed, and
PyTorch does the work.
"""

from coterie.ops.cpu.attend import attend, attends, attention
from coterie.ops.cpu.checksum import crc32
from coterie.ops.cpu.kernels import (
    expert_bytes,
    isas,
    memory,
    pack,
    packed_format,
    read,
    ready,
    run_experts,
)
from coterie.ops.cpu.linear import linear, pack_matrix, packs, swiglu
from coterie.ops.cpu.route import route
from coterie.ops.cpu.rows import add_norm, norms, rms_norm, survey, surveys

__all__ = [
    "add_norm",
    "attend",
    "attends",
    "attention",
    "crc32",
    "expert_bytes",
    "isas",
    "linear",
    "memory",
    "norms",
    "pack",
    "pack_matrix",
    "packed_format",
    "packs",
    "read",
    "ready",
    "rms_norm",
    "route",
    "run_experts",
    "survey",
    "surveys",
    "swiglu",
]
