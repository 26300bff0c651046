"""Triton's interpreter takes minutes for an exclusive or over an axis; NumPy has a word for it."""

from __future__ import annotations

import numpy as np
import pytest


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone; the values are the same."""
    import triton.language as tl
    from triton.runtime.interpreter import ReduceOps

    slow = ReduceOps.apply_impl

    def apply_impl(self: ReduceOps, input: tuple[tl.tensor, ...]):  # type: ignore[name-defined]
        if self.combine_fn is not tl.standard._xor_combine:
            return slow(self, input)
        found = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, input[0].dtype)

    patch.setattr(ReduceOps, "apply_impl", apply_impl)
