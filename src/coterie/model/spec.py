"""The architecture of a model as numbers: exactly what the transformer needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from coterie.ops.packed_layout import expert_bytes
from coterie.quantization import QuantFormat
from coterie.values import Activation, PackedFormat, RouterSpec

UNQUANTISED = "whole"


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of one layer; two layers of equal specs share positions and masks."""

    kv_heads: int
    head_dim: int
    rotary_dim: int  # features of each head that RoPE rotates, from the first on
    rope_theta: float
    rope_angles: int = 0  # pairs that turn; the other pairs have angle 0. 0 = all
    window: int = 0  # keys that a query sees, up to its own block; 0 = all
    scale: float | None = None  # of the scores; None = head_dim ** -0.5
    norms_values: bool = False  # values are RMS-normalised, without a weight
    keys_are_values: bool = False  # values are the projected keys, before norm and RoPE

    @property
    def fits_kernels(self) -> bool:
        """Whether the fused kernels compute this attention."""
        special = self.window or self.norms_values or self.keys_are_values
        return not special and self.scale is None

    @property
    def kv_projections(self) -> int:
        """Projected KV heads: keys, and values unless the keys are the values."""
        return self.kv_heads if self.keys_are_values else 2 * self.kv_heads


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
    layer_attention: tuple[AttentionSpec, ...] = ()  # per layer; () = the sizes above in each
    activation: Activation = "silu"  # of the gate of dense networks and experts
    embedding_scale: float = 1.0
    logit_cap: float = 0.0  # logits z become cap * tanh(z / cap); 0 = none
    parallel_dense: bool = False  # a dense network of ``shared_width`` stands beside the experts
    self_conditioning: int = 0  # width of the network that reads the last logits; 0 = none
    block: int = 0  # tokens denoised together in training; 0 = as in the family
    expert_format: QuantFormat | None = None  # of the routed experts; None = not quantised
    panels: bool = False  # the routed experts are in the packed layout
    dense_format: QuantFormat | None = None  # of the dense matrices; None = not quantised

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, has_experts in enumerate(self.moe) if has_experts)

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

    @cached_property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """The attention of each layer."""
        common = AttentionSpec(self.kv_heads, self.head_dim, self.rotary_dim, self.rope_theta)
        return self.layer_attention or (common,) * self.layers

    def qkv_rows(self, layer: int) -> int:
        """Rows of the fused projection: all query heads, then keys, then values."""
        attention = self.attention[layer]
        return (self.heads + attention.kv_projections) * attention.head_dim

    @property
    def kv_features(self) -> int:
        """Numbers in the keys and values of one position, of all layers."""
        return sum(2 * layer.kv_heads * layer.head_dim for layer in self.attention)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert: gate, up and down."""
        return 3 * self.hidden * self.expert_width
