"""Packed matrices and their products."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from coterie.checks import address, describe
from coterie.ops.cpu.experts import allocate, release_pages
from coterie.ops.cpu.library import MatmulArgs, PackMatrixArgs, SiluMulArgs, require_library
from coterie.ops.cpu.op_chain import run_ops
from coterie.quantization import FORMATS, QTensor
from coterie.values import PackedMatrix

_FLOATS = (torch.bfloat16, torch.float32)
_FORMAT_IDS: Mapping[torch.dtype, int] = {torch.bfloat16: 0, torch.int8: 1, torch.float32: 3}
"""See ``api.hpp``."""

PACK_CHUNK_ROWS = 1 << 12  # rows packed at once; a multiple of a panel pair's rows


def can_pack_matrix(weight: Tensor | QTensor) -> bool:
    """Whether ``pack_matrix`` supports this matrix."""
    if weight.device.type != "cpu" or len(weight.shape) != 2:
        return False
    if isinstance(weight, QTensor):
        return weight.format == FORMATS["int8"]
    return weight.dtype in _FLOATS


def pack_matrix(weight: Tensor | QTensor, *, release_source: bool = False) -> PackedMatrix:
    """A matrix [rows, k] in bf16, fp32 or int8 in the packed layout, in new memory.

    With ``release_source`` the source pages are returned to the system during packing.
    """
    rows, k = weight.shape
    quantized = isinstance(weight, QTensor)
    values = (weight.q if quantized else weight).detach().contiguous()
    scales = weight.scales.contiguous() if quantized else values.new_empty(rows, 0)
    packed = allocate(1, _matrix_bytes(weight.dtype, rows, k))[0]
    for first in range(0, rows, PACK_CHUNK_ROWS):
        chunk = values[first : first + PACK_CHUNK_ROWS]
        args = PackMatrixArgs(
            rows=chunk.data_ptr(),
            scales=scales[first:].data_ptr(),
            panels=packed.data_ptr() + _matrix_bytes(weight.dtype, first, k),
            count=len(chunk),
            k=k,
            threads=torch.get_num_threads(),
            format=_FORMAT_IDS[weight.dtype],
        )
        require_library().handle.coterie_pack_matrix(ctypes.byref(args))
        if release_source:
            release_pages([chunk])
    return PackedMatrix(packed, weight.dtype, (rows, k))


def linear(x: Tensor, weight: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """See ``ops.linear``. The result is bit-identical for any number of threads."""
    x = (x if x.dtype in _FLOATS else x.float()).detach().contiguous()
    out = empty_product(x, weight, dtype if dtype in _FLOATS else torch.float32)
    run_ops(matmul_args(x, weight, out))
    return out.to(dtype)


def swiglu(x: Tensor, gate_up: PackedMatrix, down: PackedMatrix, residual: Tensor | None) -> Tensor:
    """See ``ops.gated_mlp``: with silu."""
    x = x.detach().contiguous()
    gate_up_out, width = empty_product(x, gate_up, x.dtype), down.shape[1]
    if x.dtype is not torch.bfloat16:
        raise ValueError(f"tokens are {describe(x)}; use bf16")
    if gate_up.shape[0] != 2 * width:
        raise ValueError(f"gate_up {gate_up.shape} does not match down {down.shape}")
    hidden, rows = gate_up_out.new_empty(*x.shape[:-1], width), x.shape[:-1].numel()
    out = empty_product(hidden, down, x.dtype)
    silu_args = SiluMulArgs(gate_up_out.data_ptr(), hidden.data_ptr(), rows, width)
    down_args = matmul_args(hidden, down, out)
    if residual is not None:
        residual = residual.contiguous().view(-1)
        down_args.residual = address(residual, torch.float32, (out.numel(),), "residual")
    run_ops(matmul_args(x, gate_up, gate_up_out), silu_args, down_args)
    return out


def empty_product(x: Tensor, weight: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for the product of x with a matrix."""
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


def matmul_args(x: Tensor, weight: PackedMatrix, out: Tensor) -> MatmulArgs:
    """The kernel arguments of a product; x and out are bf16 or fp32."""
    rows, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"tokens have {x.shape[-1]} features, the matrix {k} columns")
    if x.dtype not in _FLOATS:
        raise ValueError(f"tokens are {describe(x)}; use bf16 or fp32")
    return MatmulArgs(
        x=address(x, x.dtype, x.shape, "tokens"),
        panels=weight.packed.data_ptr(),
        out=out.data_ptr(),
        tokens=x.shape[:-1].numel(),
        k=k,
        rows=rows,
        format=_FORMAT_IDS[weight.dtype],
        x_is_bf16=x.dtype == torch.bfloat16,
        out_is_bf16=out.dtype == torch.bfloat16,
    )


def _matrix_bytes(dtype: torch.dtype, rows: int, k: int) -> int:
    return require_library().handle.coterie_matrix_bytes(_FORMAT_IDS[dtype], rows, k)
