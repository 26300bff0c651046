"""The quantization error of experts, measured once by conversion and read from the manifest."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie import ops
from coterie.checkpoints.manifest import manifest_checksums
from coterie.checkpoints.model_folder import ModelFolder
from coterie.quantization import QTensor, dequantize
from coterie.values import Activation, PackedExperts, Slab

ERROR_KEY = "error"
INPUT_VALUES = 1 << 16  # values of the random input; smaller experts get more tokens
SEED = 2718  # unlike the seeds of random weights, which would equal the input

FloatArray = NDArray[np.float64]


def quantization_error(reference: Slab, quantized: Slab, activation: Activation = "silu") -> float:
    """The relative error of an expert's output for unit Gaussian tokens; slabs of one expert."""
    generator = torch.Generator().manual_seed(SEED)
    hidden = reference.down.shape[1]
    x = torch.randn(-(-INPUT_VALUES // hidden), hidden, generator=generator)
    expected, actual = (expert_output(slab, x, activation) for slab in (reference, quantized))
    norm = float(expected.norm())
    return float((actual - expected).norm()) / norm if norm else 0.0


def expert_output(slab: Slab, x: Tensor, activation: Activation) -> Tensor:
    """The output for x [T, H] of the only expert in a slab, in fp32."""
    gate_up, down = (_to_float(weight)[0] for weight in (slab.gate_up, slab.down))
    return ops.linear(ops.activate_and_mul(ops.linear(x, gate_up), activation), down)


def quantization_errors(model: ModelFolder) -> dict[int, FloatArray] | None:
    """The errors [E] of each layer's packed experts, relative to bf16.

    None if the manifest does not list them.
    """
    spec = model.spec
    if spec.expert_format is None:
        return {layer: np.zeros(spec.router.experts) for layer in spec.moe_layers}
    entries, errors = manifest_checksums(model.path), {}
    for layer, _, entry in model.packed_experts():
        values = entries.get(entry.name, {}).get(ERROR_KEY)
        if not isinstance(values, list) or len(values) != spec.router.experts:
            return None
        errors[layer] = np.array(values, dtype=np.float64)
    return errors


def _to_float(weight: Tensor | QTensor | PackedExperts) -> Tensor:
    assert not isinstance(weight, PackedExperts)
    return dequantize(weight) if isinstance(weight, QTensor) else weight.float()
