"""The transformer of all families: norm, attention, norm, feed-forward; then the head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie import ops
from coterie.model.attention import Attention, AttentionMetadata
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import Dense, FeedForward, MoE
from coterie.model.size import model_size
from coterie.model.spec import ModelSpec
from coterie.ops.threads import limited_threads
from coterie.routing import needs_importance
from coterie.values import ExpertStore, Matrix

LAYER_REGIONS = 8  # parallel regions of a layer in plain torch


@dataclass(frozen=True)
class TransformerLayer:
    """Attention and feed-forward, each with a pre-norm and a residual connection."""

    spec: ModelSpec
    attention_norm: Tensor  # [H]
    attention: Attention
    feed_forward_norm: Tensor  # [H]
    feed_forward: FeedForward

    def __call__(self, x: Tensor, metadata: AttentionMetadata, context: ForwardContext) -> Tensor:
        """x [B, W, H] -> [B, W, H]."""
        needs_received = isinstance(self.feed_forward, MoE) and needs_importance(context.policy)
        normed = ops.rms_norm(x, self.attention_norm, self.spec.norm_epsilon)
        attn_output, received_attention = self.attention(
            normed, metadata, context.cache, return_received=needs_received
        )
        importance = None
        if received_attention is not None:
            importance = received_attention * x.float().abs().sum(-1)
        x, normed = ops.add_rms_norm(x, attn_output, self.feed_forward_norm, self.spec.norm_epsilon)
        return x + self.feed_forward(normed, context, importance)


@dataclass(frozen=True)
class Transformer:
    """Maps tokens to logits; all inputs that vary between calls are in the ForwardContext."""

    spec: ModelSpec
    embedding: Tensor  # [vocabulary, H]
    layers: tuple[TransformerLayer, ...]
    norm: Tensor  # [H]
    head: Matrix  # [vocabulary, H]

    def __call__(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        """Logits [P, vocabulary] fp32 of tokens [B, W] int64 at ``context.logits_indices``.

        The recorder receives every layer's output and, as layer ``spec.layers``, the normed hidden
        states [P, H] that the head reads.
        """
        with limited_threads(self._multiplications * tokens.numel(), regions=LAYER_REGIONS):
            return self._forward(tokens, context)

    def _forward(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        metadata = AttentionMetadata.of(context.window, context.cache, self.spec, self.device)
        x = self.embed(tokens) if context.embeddings is None else context.embeddings
        context.recorder.on_layer_output(-1, x)
        for index, layer in enumerate(self.layers):
            x = layer(x, metadata, context)
            context.recorder.on_layer_output(index, x)
        x = x.flatten(0, 1)
        if context.logits_indices is not None:
            x = x[context.logits_indices]
        x = ops.rms_norm(x, self.norm, self.spec.norm_epsilon)
        context.recorder.on_layer_output(self.spec.layers, x)
        return ops.linear(x, self.head, dtype=torch.float32)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, W] int64 -> [B, W, H]."""
        return F.embedding(tokens, self.embedding)

    @cached_property
    def _multiplications(self) -> int:
        """Of a token in one layer, on average, without attention to other tokens."""
        return model_size(self.spec, self.dtype).active_parameters // max(1, self.spec.layers)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype


def build(spec: ModelSpec, weights: dict[str, Tensor], store: ExpertStore) -> Transformer:
    """Assembles a transformer from weights named as in ``weight_shapes`` and a store of experts.

    In bf16 on a CPU the matrices are packed, and their originals are removed from ``weights``.
    """
    layers = tuple(_layer(spec, layer, weights, store) for layer in range(spec.layers))
    embedding = weights["embedding"]
    head = embedding if spec.tie_embeddings else _prepared_matrix(weights, "head")
    return Transformer(spec, embedding, layers, weights["norm"], head)


def _layer(
    spec: ModelSpec, layer: int, weights: dict[str, Tensor], store: ExpertStore
) -> TransformerLayer:
    name = f"layers.{layer}"
    attention = Attention(
        spec,
        layer,
        qkv=_prepared_matrix(weights, f"{name}.qkv"),
        out=_prepared_matrix(weights, f"{name}.out"),
        query_norm=weights[f"{name}.query_norm"],
        key_norm=weights[f"{name}.key_norm"],
    )
    return TransformerLayer(
        spec,
        attention_norm=weights[f"{name}.attention_norm"],
        attention=attention,
        feed_forward_norm=weights[f"{name}.feed_forward_norm"],
        feed_forward=_feed_forward(spec, layer, weights, store),
    )


def _feed_forward(
    spec: ModelSpec, layer: int, weights: dict[str, Tensor], store: ExpertStore
) -> FeedForward:
    name = f"layers.{layer}"
    if not spec.moe[layer]:
        return _dense(weights, f"{name}.dense")
    shared = _dense(weights, f"{name}.shared") if spec.shared_width else None
    gate, bias = _prepared_matrix(weights, f"{name}.gate"), weights.get(f"{name}.gate_bias")
    return MoE(spec, layer, gate, bias, shared, store)


def _dense(weights: dict[str, Tensor], name: str) -> Dense:
    return Dense(
        _prepared_matrix(weights, f"{name}.gate_up"), _prepared_matrix(weights, f"{name}.down")
    )


def _prepared_matrix(weights: dict[str, Tensor], name: str) -> Matrix:
    if weights["embedding"].dtype != torch.bfloat16:
        return weights[name]
    return ops.prepare_matrix(weights.pop(name), release_source=True)
