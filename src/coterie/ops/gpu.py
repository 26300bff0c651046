"""Kernels for a GPU, where Triton is installed: nothing here imports it before it is needed."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from coterie.values import Routing, Rule, Scores, Slab


@cache
def ready() -> bool:
    """Whether kernels can run; says so once where they cannot."""
    if find_spec("triton") is not None:
        return True
    logging.getLogger("coterie").warning(
        "Triton is not installed: on this GPU everything runs on PyTorch alone (pip install triton)"
    )
    return False


def route(scores: Scores, rule: Rule | None, voice: Tensor | None) -> Routing | None:
    """See ``ops.route``."""
    from coterie.ops.triton import route as by_kernel

    return by_kernel(scores, rule, voice)


def voices(asked: Tensor | None, narrowing: Tensor | None, opposite: bool) -> Tensor:
    """See ``ops.voices``."""
    from coterie.ops.triton import voices as by_kernel

    return by_kernel(asked, narrowing, opposite=opposite)


def run_experts(x: Tensor, routing: Routing, slab: Slab) -> Tensor | None:
    """See ``ops.run_experts``; None for types that no kernel takes."""
    from coterie.ops.triton import experts

    return experts.run_experts(x, routing, slab) if experts.fits(x, slab) else None
