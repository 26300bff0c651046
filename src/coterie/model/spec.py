"""The architecture of a model as numbers: exactly what the transformer needs."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.ops.packed_layout import expert_bytes
from coterie.quantization import QuantFormat
from coterie.values import PackedFormat, RouterSpec

UNQUANTISED = "whole"


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of one model; widths are in features, lengths in tokens."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int  # features of each head that RoPE rotates, from the first on
    rope_theta: float
    norm_epsilon: float
    dense_width: int  # of layers without experts; 0 = no such layers
    expert_width: int
    shared_width: int  # of the shared expert; 0 = none
    moe: tuple[bool, ...]  # per layer: whether it has experts
    router: RouterSpec
    expert_bias: bool
    tie_embeddings: bool  # the output head is the embedding
    max_length: int
    expert_format: QuantFormat | None = None  # of the routed experts; None = not quantised
    panels: bool = False  # the routed experts are in the packed layout

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, has_experts in enumerate(self.moe) if has_experts)

    @property
    def capacity(self) -> int:
        """The experts that a block admits; 0 = all."""
        return self.router.capacity

    @property
    def expert_storage(self) -> str:
        """The storage of the experts, for display."""
        if self.panels:
            return f"{self.expert_format or 'bf16'}, packed"
        return str(self.expert_format or UNQUANTISED)

    @property
    def panel_kind(self) -> PackedFormat:
        """The packed format of the experts: bf16 if they are not quantised."""
        if self.expert_format is None:
            return "bf16"
        return "int8" if self.expert_format.bits == 8 else "int4"

    @property
    def expert_stride(self) -> int:
        """Bytes of one packed expert, aligned."""
        return expert_bytes(self.panel_kind, hidden=self.hidden, width=self.expert_width)

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: all query heads, then keys, then values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert: gate, up and down."""
        return 3 * self.hidden * self.expert_width
