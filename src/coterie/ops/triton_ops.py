"""The Triton kernels, imported on first use, where Triton is installed."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

from torch import Tensor


def kernels_for(tensor: Tensor):
    """The package ``ops.triton`` if ``tensor`` is on a GPU and Triton is installed, else None."""
    return _kernels() if tensor.is_cuda else None


@cache
def _kernels():
    """The package, or None; logs the absence of Triton once."""
    if find_spec("triton") is None:
        logging.getLogger("coterie").warning(
            "Triton is not installed: this GPU runs PyTorch operations only, which is slower "
            "(pip install triton)"
        )
        return None
    from coterie.ops import triton

    return triton
