"""What a model is, as numbers: everything that the transformer needs and nothing it does not."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.ops.packed_layout import PackedFormat, expert_bytes
from coterie.quantization import QuantFormat
from coterie.values import RouterSpec

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
    rotary_dim: int  # the first features of each head turn with position, the others do not
    rope_theta: float
    norm_epsilon: float
    dense_width: int  # of the layers without experts; 0 = there are none
    expert_width: int
    shared_width: int  # of the expert that every token passes through; 0 = none
    moe: tuple[bool, ...]  # per layer: does it have experts
    router: RouterSpec
    expert_bias: bool
    tie_embeddings: bool  # the head is the embedding
    max_length: int
    capacity: int = 0  # experts a block may use together as the model was trained; 0 = all
    expert_format: QuantFormat | None = None  # of the routed experts' weights; None: as all others
    panels: bool = False  # the routed experts are packed as the kernels of a CPU read them

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, has_experts in enumerate(self.moe) if has_experts)

    @property
    def expert_storage(self) -> str:
        """How the experts are stored, in words."""
        if self.panels:
            return f"{self.expert_format or 'bf16'}, packed"
        return str(self.expert_format or UNQUANTISED)

    @property
    def panel_kind(self) -> PackedFormat:
        """Of the experts where they are packed: those that are not quantised are bf16."""
        if self.expert_format is None:
            return "bf16"
        return "int8" if self.expert_format.bits == 8 else "int4"

    @property
    def expert_stride(self) -> int:
        """Bytes from one packed expert to the next."""
        return expert_bytes(self.panel_kind, hidden=self.hidden, width=self.expert_width)

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: all query heads, then keys, then values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert: gate, up and down."""
        return 3 * self.hidden * self.expert_width
