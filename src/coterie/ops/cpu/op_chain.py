"""Works one after the other in one call of the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TypeAlias

import torch

from coterie.ops.cpu.experts import ERROR_MESSAGES, require_library
from coterie.ops.cpu.library import AttentionArgs, MatmulArgs, Op, OpList, RmsNormArgs, SiluMulArgs

OpArgs: TypeAlias = MatmulArgs | AttentionArgs | RmsNormArgs | SiluMulArgs

_OP_KINDS: Mapping[type[OpArgs], int] = {
    MatmulArgs: 0,
    AttentionArgs: 1,
    RmsNormArgs: 2,
    SiluMulArgs: 3,
}
"""See ``api.hpp``."""


def run_ops(*ops: OpArgs) -> None:
    """Do them in this order: what one writes, the next ones may read.

    The caller keeps all memory that they name until it returns.
    """
    array = (Op * len(ops))(*((ctypes.addressof(op), _OP_KINDS[type(op)]) for op in ops))
    op_list = OpList(ctypes.addressof(array), len(ops), torch.get_num_threads())
    kernels = require_library()
    if status := kernels.handle.coterie_run_ops(kernels.isa(), ctypes.byref(op_list)):
        names = ", ".join(type(op).__name__.lower() for op in ops)
        raise RuntimeError(f"the kernels could not run ({names}): {ERROR_MESSAGES[status]}")
