"""How far experts in few bits are from what they were made of: measured once, told by manifests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie import ops
from coterie.checkpoints.verification import manifest_checksums
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.weights import TensorTarget, is_packed
from coterie.quantization import QTensor, dequantize
from coterie.values import PackedExperts, Slab

ERROR_KEY = "error"
INPUT_VALUES = (
    1 << 16
)  # Gaussian numbers that an expert is tried with: more tokens for smaller ones

SEED = 2718  # not one that somebody draws weights with: tokens like an expert's rows are no tokens

FloatArray = NDArray[np.float64]


def quantization_error(reference: Slab, quantized: Slab) -> float:
    """Relative error of what one expert gives, in a slab of one each, for unit Gaussian tokens."""
    generator = torch.Generator().manual_seed(SEED)
    hidden = reference.down.shape[1]
    x = torch.randn(-(-INPUT_VALUES // hidden), hidden, generator=generator)
    expected, actual = expert_output(reference, x), expert_output(quantized, x)
    norm = float(expected.norm())
    return float((actual - expected).norm()) / norm if norm else 0.0


def expert_output(slab: Slab, x: Tensor) -> Tensor:
    """What the one expert of a slab makes of x [T, H], in fp32."""
    gate_up, down = (_to_float(weight)[0] for weight in (slab.gate_up, slab.down))
    return ops.linear(ops.silu_and_mul(ops.linear(x, gate_up)), down)


def quantization_errors(
    checkpoint: Checkpoint, targets: Mapping[str, TensorTarget], spec: ModelSpec
) -> dict[int, FloatArray] | None:
    """Of each layer the relative errors [E] of its packed experts; None where the manifest does
    not tell. Experts in bf16 are what the others are held against."""
    if spec.expert_format is None:
        return {layer: np.zeros(spec.router.experts) for layer in spec.moe_layers}
    checksums, errors = manifest_checksums(checkpoint.folder), {}
    for name in checkpoint.tensors:
        if not is_packed(target := targets[name].weight):
            continue
        listed = checksums.get(name, {}).get(ERROR_KEY)
        if not isinstance(listed, list) or len(listed) != spec.router.experts:
            return None
        errors[int(target.split(".")[1])] = np.array(listed, dtype=np.float64)
    return errors


def _to_float(weight: Tensor | QTensor | PackedExperts) -> Tensor:
    assert not isinstance(weight, PackedExperts)
    return dequantize(weight) if isinstance(weight, QTensor) else weight.float()
