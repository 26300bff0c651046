"""Kernels for a GPU, where Triton is installed: nothing here imports it before it is needed."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from coterie.values import KeyValues, Routing, Rule, Scores, Sight, Slab, Survey


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


def attend(
    qkv: Tensor, norms: tuple[Tensor, Tensor], sight: Sight, held: KeyValues, epsilon: float
) -> Tensor | None:
    """See ``ops.attend``."""
    from coterie.ops.triton import attention

    able = attention.attends(qkv, held)
    return attention.attend(qkv, norms, sight, held, epsilon) if able else None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor | None:
    """See ``ops.rms_norm``; None for types that no kernel takes."""
    from coterie.ops.triton import rows

    return rows.rms_norm(x, weight, epsilon) if rows.norms(x, weight) else None


def survey(logits: Tensor, mask: int) -> Survey:
    """See ``ops.survey``: logits in fp32."""
    from coterie.ops.triton import rows

    return rows.survey(logits, mask)


def gated(both: Tensor) -> Tensor:
    """See ``ops.gated``."""
    from coterie.ops.triton import rows

    return rows.gated(both)
