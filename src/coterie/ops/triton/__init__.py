"""Kernels for a GPU; imported only when a tensor that lives on one arrives.

Without a GPU they run in Triton's interpreter, where TRITON_INTERPRET=1 was set before any import.
"""

from coterie.ops.triton.dispatch import dispatch
from coterie.ops.triton.routing import route
from coterie.ops.triton.vote_weights import vote_weights

__all__ = ["dispatch", "route", "vote_weights"]
