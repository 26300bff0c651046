"""The rates of a machine for one model's shape: measured in seconds, and the time they predict.

A layer of experts is read while it is multiplied. For T experts and P token-expert pairs:

    read = T * expert_bytes / read_bandwidth
    multiply = t0 + b T + a P                        kernels on weights in the processor's cache
    layer = longer + (1 - overlap) * shorter

All other parts of a forward follow the benchmark's roofline with the same overlap. What a small
forward takes beyond that is a fixed time of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import numpy as np
import torch

from coterie.keys import Key
from coterie.lab.bench.cost_model import (
    ForwardPart,
    kv_bytes,
    overlapped,
    part_bytes,
    part_flops,
    roofline_seconds,
)
from coterie.lab.bench.model import ExpertDtype
from coterie.lab.planner.expert_counts import PassCounts
from coterie.lab.replay.hardware_model import HardwareModel
from coterie.lab.replay.hardware_model import predict_seconds as predict_forwards
from coterie.lab.timing import LatencyFit, predict_seconds
from coterie.model.size import ModelSize, model_size
from coterie.model.spec import ModelSpec

NO_COPIES = HardwareModel(link_bandwidth=float("inf"))


@dataclass(frozen=True)
class MachineRates:
    """What forwards of one shape reach on a machine.

    ``experts`` are the seconds of a layer of experts in the processor's cache, by format.
    ``copies`` is how experts are fetched from where they are when memory lacks them.
    """

    read_bandwidth: Annotated[float, Key("read")]  # bytes per second
    matrix_rate: Annotated[float, Key("matrix")]  # FLOPs per second
    router_rate: Annotated[float, Key("router")]
    experts: Annotated[Mapping[str, LatencyFit], Key("experts")]
    overlap: Annotated[float, Key("overlap")]
    layer_seconds: Annotated[float, Key("layer")]
    copies: Annotated[HardwareModel | None, Key("copies")]  # None: nothing is fetched


@dataclass(frozen=True)
class ShapeCost:
    """A model in one format, on one device; ``expert_bytes`` are those of a routed expert."""

    spec: ModelSpec
    dtype: torch.dtype
    format_name: ExpertDtype
    expert_bytes: int

    @cached_property
    def size(self) -> ModelSize:
        return model_size(self.spec, self.dtype)

    def part_bytes(self, positions: int) -> dict[ForwardPart, int]:
        """Bytes that every forward reads besides experts."""
        return self._weight_bytes | kv_bytes(self.spec, self.dtype, positions)

    @cached_property
    def _weight_bytes(self) -> dict[ForwardPart, int]:
        return part_bytes(self.spec, self.dtype)

    def bytes(self, positions: int, counts: PassCounts) -> float:
        """Bytes that a forward reads; ``positions`` are in the KV cache."""
        experts = counts.mean_used * len(self.spec.moe_layers) * self.expert_bytes
        return experts + sum(self.part_bytes(positions).values())

    def seconds(
        self,
        rates: MachineRates,
        counts: PassCounts,
        *,
        tokens: int,
        num_logits: float,
        positions: int,
    ) -> float:
        """Predicted mean seconds of forwards; the clock of replays counts fetched experts."""
        spec = self.spec
        sizes = self.part_bytes(positions)
        flops: dict[ForwardPart, float] = dict(part_flops(spec, tokens, positions))
        flops["head"] = 2 * spec.hidden * spec.vocabulary * num_logits
        others = roofline_seconds(
            sizes,
            flops,
            bandwidth=rates.read_bandwidth,
            rates={"matrix": rates.matrix_rate, "router": rates.router_rate},
            overlap=rates.overlap,
        )
        experts = len(spec.moe_layers) * self.layer_seconds(rates, counts)
        return experts + others + spec.layers * rates.layer_seconds

    def layer_seconds(self, rates: MachineRates, counts: PassCounts) -> float:
        """Mean seconds of a layer's experts, those that are fetched included."""
        computed = self.expert_seconds(rates, counts.mean_used, counts.pairs)
        memory = counts.mean_used * self.expert_bytes / computed
        copies = rates.copies or NO_COPIES
        hardware = replace(copies, memory_bandwidth=memory, other_seconds=0.0)
        sampled, _ = predict_forwards(hardware, counts.used, counts.loads, self.expert_bytes)
        return float(sampled.mean()) / counts.used.shape[1]

    def expert_seconds(self, rates: MachineRates, experts: float, pairs: float) -> float:
        """Seconds of a layer's experts in memory."""
        read = experts * self.expert_bytes / rates.read_bandwidth
        multiply = predict_seconds(rates.experts[self.format_name], experts, pairs)
        return overlapped(read, max(0.0, multiply), rates.overlap)


def fitted_overlap(
    reads: Sequence[float], products: Sequence[float], layers: Sequence[float]
) -> float:
    """The overlap, 0 to 1, with which these layers take the least squared error."""
    shorter = np.minimum(reads, products)
    hidden = np.add(reads, products) - np.array(layers)
    return float(np.clip((shorter @ hidden) / max(1e-30, shorter @ shorter), 0, 1))
