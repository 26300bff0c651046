"""Checks of tensors before a kernel reads their memory: C++ sees addresses only."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> int:
    """The address of a contiguous tensor of this dtype and shape in host memory."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous():
        return tensor.data_ptr()
    order = "contiguous" if tensor.is_contiguous() else "not contiguous"
    raise ValueError(
        f"{name}: {describe(tensor)} on {tensor.device.type}, {order}; the kernels need "
        f"{list(shape)} {dtype} on cpu, contiguous"
    )


def optional_address(
    tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], name: str
) -> int | None:
    """``address``, or None without a tensor."""
    return None if tensor is None else address(tensor, dtype, shape, name)


def describe(tensor: Tensor) -> str:
    """Shape and dtype for an error."""
    return f"{list(tensor.shape)} {tensor.dtype}"
