"""How far experts in few bits are from what they were made of: measured once, told by manifests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie import ops
from coterie.engine.verify import sums_of
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.weights import Place, is_packed
from coterie.quant import QTensor, dequantise
from coterie.values import Panels, Slab

ERROR = "error"
INPUT = 1 << 16  # Gaussian numbers that an expert is tried with: more tokens for smaller ones

SEED = 2718  # not one that somebody draws weights with: tokens like an expert's rows are no tokens

Numbers = NDArray[np.float64]


def distance(true: Slab, found: Slab) -> float:
    """Relative error of what one expert gives, in a slab of one each, for unit Gaussian tokens."""
    draw = torch.Generator().manual_seed(SEED)
    hidden = true.down.shape[1]
    x = torch.randn(-(-INPUT // hidden), hidden, generator=draw)
    best, given = given_by(true, x), given_by(found, x)
    norm = float(best.norm())
    return float((given - best).norm()) / norm if norm else 0.0


def given_by(slab: Slab, x: Tensor) -> Tensor:
    """What the one expert of a slab makes of x [T, H], in fp32."""
    gate_up, down = (_floats(weight)[0] for weight in (slab.gate_up, slab.down))
    return ops.linear(ops.gated(ops.linear(x, gate_up)), down)


def distances(
    checkpoint: Checkpoint, places: Mapping[str, Place], spec: ModelSpec
) -> dict[int, Numbers] | None:
    """Of each layer the relative errors [E] of its packed experts; None where the manifest does
    not tell. Experts in bf16 are what the others are held against."""
    if spec.expert_format is None:
        return {layer: np.zeros(spec.router.experts) for layer in spec.moe_layers}
    sums, found = sums_of(checkpoint.folder), {}
    for name in checkpoint.tensors:
        if not is_packed(target := places[name].target):
            continue
        told = sums.get(name, {}).get(ERROR)
        if not isinstance(told, list) or len(told) != spec.router.experts:
            return None
        found[int(target.split(".")[1])] = np.array(told, dtype=np.float64)
    return found


def _floats(weight: Tensor | QTensor | Panels) -> Tensor:
    assert not isinstance(weight, Panels)
    return dequantise(weight) if isinstance(weight, QTensor) else weight.float()
