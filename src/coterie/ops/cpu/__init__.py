"""Experts on a CPU, at the speed of its memory: weights packed once, read as one stream.

The kernels are C++ behind a plain C interface. Where they were not built nothing is packed, and
PyTorch does the work.
"""

from coterie.ops.cpu.kernels import (
    expert_bytes,
    isas,
    pack,
    packed_format,
    read,
    ready,
    run_experts,
)

__all__ = ["expert_bytes", "isas", "pack", "packed_format", "read", "ready", "run_experts"]
