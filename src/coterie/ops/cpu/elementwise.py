"""Row-wise kernels: RMS norm and logits summary."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.checks import address, describe
from coterie.ops.cpu.library import LogitsSummaryArgs, RmsNormArgs, is_available, require_library
from coterie.ops.cpu.op_chain import run_ops
from coterie.ops.threads import busy_threads
from coterie.values import NO_MASK, LogitsSummary

LOGIT_COST = 8  # of a logit's exponential, in multiplications


def supports_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` supports these tensors."""
    is_bf16 = x.dtype is weight.dtype is torch.bfloat16
    is_plain = x.is_cpu and x.is_contiguous() and weight.is_contiguous() and x.numel() > 0
    return is_bf16 and is_plain and is_available()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``ops.rms_norm``."""
    out = torch.empty_like(x)
    run_ops(rms_norm_args(x, weight, epsilon, out))
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """See ``ops.add_rms_norm``."""
    residual, total, out = residual.contiguous(), torch.empty_like(x), torch.empty_like(x)
    args = rms_norm_args(x, weight, epsilon, out)
    args.residual = address(residual, x.dtype, x.shape, "residual")
    args.sum = total.data_ptr()
    run_ops(args)
    return total, out


def rms_norm_args(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> RmsNormArgs:
    """The kernel arguments of an RMS norm of rows of at least one element."""
    width = x.shape[-1]
    return RmsNormArgs(
        x=address(x, torch.bfloat16, x.shape, "x"),
        weight=address(weight, torch.bfloat16, (width,), "norm weight"),
        out=out.data_ptr(),
        epsilon=epsilon,
        rows=x.numel() // width,
        width=width,
    )


def supports_logits_summary(logits: Tensor) -> bool:
    """Whether ``summarize_logits`` supports these logits."""
    is_plain = logits.dtype is torch.float32 and logits.is_cpu and logits.numel() > 0
    return is_plain and is_available()


def summarize_logits(logits: Tensor, mask_id: int) -> LogitsSummary:
    """See ``ops.summarize_logits``."""
    logits = logits.detach().contiguous()
    rows, width = logits.shape
    if not NO_MASK <= mask_id < width:
        raise ValueError(f"mask id {mask_id} is no column of {describe(logits)}")
    best, unmasked = torch.empty(2, rows, dtype=torch.int64)
    logsumexp = torch.empty(rows)
    args = LogitsSummaryArgs(
        logits=address(logits, torch.float32, (rows, width), "logits"),
        best=best.data_ptr(),
        unmasked=unmasked.data_ptr(),
        logsumexp=logsumexp.data_ptr(),
        rows=rows,
        width=width,
        mask_id=mask_id,
        threads=busy_threads(LOGIT_COST * rows * width),
    )
    require_library().call("summarize_logits", args)
    return LogitsSummary.from_logits(logits, best, unmasked, logsumexp)
