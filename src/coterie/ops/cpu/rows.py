"""What is done to every row by itself: norms, and what a row of logits says."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from coterie.ops.cpu.chain import follow
from coterie.ops.cpu.kernels import OUTCOMES, built, ready
from coterie.ops.cpu.library import Norming, Surveying
from coterie.values import Survey


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` takes them."""
    half = x.dtype == weight.dtype == torch.bfloat16
    return half and x.device.type == "cpu" and x.is_contiguous() and ready()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``ops.rms_norm``."""
    out = torch.empty_like(x)
    follow(norming(x, weight, epsilon, out))
    return out


def add_norm(x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See ``ops.add_norm``."""
    more, total, out = more.contiguous(), torch.empty_like(x), torch.empty_like(x)
    work = norming(x, weight, epsilon, out)
    work.more, work.sum = more.data_ptr(), total.data_ptr()
    follow(work)
    return total, out


def norming(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> Norming:
    """The work of a norm; ``norms`` says of what."""
    width = x.shape[-1]
    return Norming(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        epsilon=epsilon,
        rows=x.numel() // width,
        width=width,
    )


def surveys(logits: Tensor) -> bool:
    """Whether ``survey`` takes them."""
    return logits.dtype == torch.float32 and logits.device.type == "cpu" and ready()


def survey(logits: Tensor, mask: int) -> Survey:
    """See ``ops.survey``."""
    logits = logits.detach().contiguous()
    rows, width = logits.shape
    best, unmasked = torch.empty(2, rows, dtype=torch.int64)
    total = torch.empty(rows)
    call = Surveying(
        logits=logits.data_ptr(),
        best=best.data_ptr(),
        unmasked=unmasked.data_ptr(),
        total=total.data_ptr(),
        rows=rows,
        width=width,
        mask=mask,
        threads=torch.get_num_threads(),
    )
    found = built()
    if outcome := found.handle.coterie_survey(found.isa(), ctypes.byref(call)):
        raise RuntimeError(f"the logits could not be surveyed: {OUTCOMES[outcome]}")
    return Survey.of(logits, best, unmasked, total)
