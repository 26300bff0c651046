"""Matrices in panels, and all tokens times one of them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from coterie.ops.cpu.chain import follow
from coterie.ops.cpu.kernels import built, give_back, memory
from coterie.ops.cpu.library import Gating, MatrixPacking, Product
from coterie.values import PackedMatrix

_FORMATS: Mapping[torch.dtype, int] = {torch.bfloat16: 0, torch.float32: 3}
"""See ``api.hpp``."""

CHUNK = 1 << 12  # rows packed at once: a multiple of those in a couple of panels


def packs(weight: Tensor) -> bool:
    """Whether ``pack_matrix`` takes it."""
    return weight.device.type == "cpu" and weight.dim() == 2 and weight.dtype in _FORMATS


def pack_matrix(weight: Tensor, *, spend: bool = False) -> PackedMatrix:
    """A matrix [rows, k] in bf16 or fp32 as ``linear`` reads it, in memory of its own.

    With ``spend`` the pages of what is packed go back to the system meanwhile.
    """
    rows, k = weight.shape
    weight = weight.detach().contiguous()
    packed = memory(1, _bytes(weight.dtype, rows, k))[0]
    for first in range(0, rows, CHUNK):
        some = weight[first : first + CHUNK]
        call = MatrixPacking(
            rows=some.data_ptr(),
            panels=packed.data_ptr() + _bytes(weight.dtype, first, k),
            count=len(some),
            k=k,
            threads=torch.get_num_threads(),
            format=_FORMATS[weight.dtype],
        )
        built().handle.coterie_pack_matrix(ctypes.byref(call))
        if spend:
            give_back([some])
    return PackedMatrix(packed, weight.dtype, (rows, k))


def linear(x: Tensor, weight: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """See ``ops.linear``. Bit for bit the same whatever the number of threads."""
    x = (x if x.dtype in _FORMATS else x.float()).detach().contiguous()
    out = product_of(x, weight, dtype if dtype in _FORMATS else torch.float32)
    follow(product(x, weight, out))
    return out.to(dtype)


def swiglu(x: Tensor, gate_up: PackedMatrix, down: PackedMatrix, beside: Tensor | None) -> Tensor:
    """See ``ops.swiglu``."""
    x = x.detach().contiguous()
    both, width = product_of(x, gate_up, x.dtype), down.shape[1]
    if gate_up.shape[0] != 2 * width:
        raise ValueError(f"gate and up {gate_up.shape} and down {down.shape}")
    hidden, rows = both.new_empty(*x.shape[:-1], width), x.numel() // x.shape[-1]
    out = product_of(hidden, down, x.dtype)
    gating = Gating(both.data_ptr(), hidden.data_ptr(), rows, width)
    last = product(hidden, down, out)
    if beside is not None:
        beside = beside.contiguous()
        if beside.dtype != torch.float32 or beside.numel() != out.numel():
            raise ValueError(f"{tuple(beside.shape)} in {beside.dtype} beside {tuple(out.shape)}")
        last.beside = beside.data_ptr()
    follow(product(x, gate_up, both), gating, last)
    return out


def product_of(x: Tensor, weight: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Memory for the product of x with a matrix."""
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


def product(x: Tensor, weight: PackedMatrix, out: Tensor) -> Product:
    """The work of a product; both dtypes are those of matrices."""
    rows, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"tokens of {x.shape[-1]} numbers meet a matrix of {k} columns")
    return Product(
        x=x.data_ptr(),
        panels=weight.packed.data_ptr(),
        out=out.data_ptr(),
        tokens=x.numel() // k,
        k=k,
        rows=rows,
        format=_FORMATS[weight.dtype],
        x_is_bf16=x.dtype == torch.bfloat16,
        out_is_bf16=out.dtype == torch.bfloat16,
    )


def _bytes(dtype: torch.dtype, rows: int, k: int) -> int:
    return built().handle.coterie_matrix_bytes(_FORMATS[dtype], rows, k)
