"""Runs several operations in one kernel call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TypeAlias

from coterie.ops.cpu.library import (
    AttentionArgs,
    MatmulArgs,
    Op,
    OpList,
    RmsNormArgs,
    SiluMulArgs,
    require_library,
)
from coterie.ops.threads import busy_threads

OpArgs: TypeAlias = MatmulArgs | AttentionArgs | RmsNormArgs | SiluMulArgs

_OP_KINDS: Mapping[type[OpArgs], int] = {
    MatmulArgs: 0,
    AttentionArgs: 1,
    RmsNormArgs: 2,
    SiluMulArgs: 3,
}
"""See ``api.hpp``."""


def run_ops(*ops: OpArgs) -> None:
    """Runs the operations in order; each may read what earlier ones wrote.

    The caller keeps all tensors that the arguments point to alive.
    """
    array = (Op * len(ops))(*((ctypes.addressof(op), _OP_KINDS[type(op)]) for op in ops))
    threads = busy_threads(sum(op.multiplications() for op in ops))
    require_library().call("run_ops", OpList(ctypes.addressof(array), len(ops), threads))
