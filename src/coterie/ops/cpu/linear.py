"""Matrices in panels, and all tokens times one of them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from coterie.ops.cpu.kernels import OUTCOMES, built, give_back, memory
from coterie.ops.cpu.library import MatrixPacking, Product
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
    rows, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"tokens of {x.shape[-1]} numbers meet a matrix of {k} columns")
    x = (x if x.dtype in _FORMATS else x.float()).detach().contiguous()
    out = torch.empty(*x.shape[:-1], rows, dtype=dtype if dtype in _FORMATS else torch.float32)
    found = built()
    call = Product(
        x=x.data_ptr(),
        panels=weight.packed.data_ptr(),
        out=out.data_ptr(),
        tokens=x.numel() // k,
        k=k,
        rows=rows,
        threads=torch.get_num_threads(),
        format=_FORMATS[weight.dtype],
        x_is_bf16=x.dtype == torch.bfloat16,
        out_is_bf16=out.dtype == torch.bfloat16,
    )
    if outcome := found.handle.coterie_multiply(found.isa(), ctypes.byref(call)):
        raise RuntimeError(f"the product could not be made: {OUTCOMES[outcome]}")
    return out.to(dtype)


def _bytes(dtype: torch.dtype, rows: int, k: int) -> int:
    return built().handle.coterie_matrix_bytes(_FORMATS[dtype], rows, k)
