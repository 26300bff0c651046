"""The transformer of all families: layers of attention and feed-forward; then the head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie import ops
from coterie.model.attention import Attention, AttentionMetadata
from coterie.model.forward_context import ForwardContext
from coterie.model.moe import Dense, FeedForward, MoE
from coterie.model.quantized_head import QuantizedHead
from coterie.model.size import model_size
from coterie.model.spec import ModelSpec
from coterie.model.weights import HEAD, MAPPED_HEAD, PARALLEL_VECTORS, quant_format
from coterie.ops.threads import limited_threads
from coterie.quantization import QTensor
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
        importance = _importance(received_attention, x)
        x, normed = ops.add_rms_norm(x, attn_output, self.feed_forward_norm, self.spec.norm_epsilon)
        return x + self.feed_forward(normed, context, importance)


@dataclass(frozen=True)
class ParallelLayer:
    """Attention, then a dense network and experts side by side; each part has a norm after it.

    The whole output is scaled, by one number in passes that encode and by another in the rest.
    """

    spec: ModelSpec
    attention_norm: Tensor  # [H]; all norms are
    attention: Attention
    attention_post_norm: Tensor
    dense_norm: Tensor
    dense: Dense
    dense_post_norm: Tensor
    feed_forward: FeedForward  # of the residual stream
    expert_post_norm: Tensor
    feed_forward_post_norm: Tensor
    scales: Tensor  # [2]: of passes that encode, and of others

    def __call__(self, x: Tensor, metadata: AttentionMetadata, context: ForwardContext) -> Tensor:
        """x [B, W, H] -> [B, W, H]."""
        attn_output, received_attention = self.attention(
            self._norm(x, self.attention_norm),
            metadata,
            context.cache,
            return_received=needs_importance(context.policy),
        )
        importance = _importance(received_attention, x)
        x = x + self._norm(attn_output, self.attention_post_norm)
        dense = self._norm(self.dense.apply(self._norm(x, self.dense_norm)), self.dense_post_norm)
        routed = self._norm(self.feed_forward(x, context, importance), self.expert_post_norm)
        x = x + self._norm(dense + routed, self.feed_forward_post_norm)
        return x * self.scales[0 if context.encodes else 1]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight, self.spec.norm_epsilon)


Layer: TypeAlias = TransformerLayer | ParallelLayer


def _importance(received_attention: Tensor | None, x: Tensor) -> Tensor | None:
    """[B, W]: the attention that a token receives times its size (MC-MoE); None if not needed."""
    return None if received_attention is None else received_attention * x.float().abs().sum(-1)


@dataclass(frozen=True)
class SelfConditioning:
    """Adds a projection of the expected embeddings of the last step's logits to the input."""

    norm: Tensor  # [H]
    projection: Dense
    epsilon: float

    def __call__(self, x: Tensor, expected: Tensor | None) -> Tensor:
        """x [B, W, H] -> [B, W, H], normed even without ``expected``, in a block's first step."""
        if expected is not None:
            x = x + self.projection.apply(ops.rms_norm(expected, self.norm, self.epsilon))
        return ops.rms_norm(x, torch.ones_like(self.norm), self.epsilon)


@dataclass(frozen=True)
class Transformer:
    """Maps tokens to logits; all inputs that vary between calls are in the ForwardContext."""

    spec: ModelSpec
    embedding: Tensor  # [vocabulary, H]
    layers: tuple[Layer, ...]
    norm: Tensor  # [H]
    head: Matrix | QuantizedHead  # [vocabulary, H]
    self_conditioning: SelfConditioning | None = None

    def __call__(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        """Logits [P, vocabulary] fp32 of tokens [B, W] int64 at ``context.logits_indices``.

        The recorder receives every layer's output and, as layer ``spec.layers``, the normed hidden
        states [P, H] that the head reads.
        """
        with limited_threads(self._multiplications * tokens.numel(), regions=LAYER_REGIONS):
            return self._forward(tokens, context)

    def _forward(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        metadata = {
            kind: AttentionMetadata.of(context.window, context.cache, kind, self.device)
            for kind in dict.fromkeys(self.spec.attention)
        }
        x = self.embed(tokens) if context.embeddings is None else context.embeddings
        if self.self_conditioning is not None and not context.encodes:
            x = self.self_conditioning(x, context.expected)
        context.recorder.on_layer_output(-1, x)
        for index, layer in enumerate(self.layers):
            x = layer(x, metadata[self.spec.attention[index]], context)
            context.recorder.on_layer_output(index, x)
        x = x.flatten(0, 1)
        if context.logits_indices is not None:
            x = x[context.logits_indices]
        x = ops.rms_norm(x, self.norm, self.spec.norm_epsilon)
        context.recorder.on_layer_output(self.spec.layers, x)
        logits = self.raw_logits(x)
        cap = self.spec.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits

    def raw_logits(self, x: Tensor) -> Tensor:
        """The head's output [P, vocabulary] fp32 of normed hidden states [P, H], without a cap."""
        if isinstance(self.head, QuantizedHead):
            return self.head(x)
        return ops.linear(x, self.head, dtype=torch.float32)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, W] int64 -> [B, W, H]."""
        return self._scaled(F.embedding(tokens, self.embedding))

    def expected_embedding(self, logits: Tensor) -> Tensor:
        """[n, V] -> [n, H]: the mean of all embeddings, weighted by their probability."""
        probabilities = torch.softmax(logits, dim=-1).to(self.dtype)
        return self._scaled(probabilities @ self.embedding)

    def _scaled(self, x: Tensor) -> Tensor:
        scale = self.spec.embedding_scale
        return x if scale == 1.0 else x * scale

    @cached_property
    def _multiplications(self) -> int:
        """Multiplications of a token in a layer, on average, without attention to other tokens."""
        return model_size(self.spec, self.dtype).active_parameters // max(1, self.spec.layers)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype


def build(spec: ModelSpec, weights: dict[str, Tensor], store: ExpertStore) -> Transformer:
    """Assembles a transformer from weights named as in ``weight_shapes`` and a store of experts.

    On a CPU matrices in bf16 and int8 are packed, and their originals are removed from ``weights``.
    """
    layers = tuple(_layer(spec, layer, weights, store) for layer in range(spec.layers))
    embedding = weights["embedding"]
    head = embedding if spec.tie_embeddings else _head(spec, weights)
    conditioning = _self_conditioning(spec, weights) if spec.self_conditioning else None
    return Transformer(spec, embedding, layers, weights["norm"], head, conditioning)


def _head(spec: ModelSpec, weights: dict[str, Tensor]) -> Matrix | QuantizedHead:
    form = spec.dense_format
    # On a GPU the search for candidates would wait for the device.
    if form is None or weights["embedding"].device.type != "cpu":
        return _prepared_matrix(replace(spec, dense_format=None), weights, HEAD)
    quantized = QTensor(weights.pop(f"{HEAD}.q"), weights.pop(f"{HEAD}.scales"), form, spec.hidden)
    in_file = MAPPED_HEAD in weights
    return QuantizedHead.of(
        weights.pop(MAPPED_HEAD if in_file else HEAD), quantized, in_file=in_file
    )


def _self_conditioning(spec: ModelSpec, weights: dict[str, Tensor]) -> SelfConditioning:
    name = "self_conditioning"
    projection = _dense(spec, weights, f"{name}.dense")
    return SelfConditioning(weights[f"{name}.norm"], projection, spec.norm_epsilon)


def _layer(spec: ModelSpec, layer: int, weights: dict[str, Tensor], store: ExpertStore) -> Layer:
    name = f"layers.{layer}"
    attention = Attention(
        spec,
        layer,
        qkv=_prepared_matrix(spec, weights, f"{name}.qkv"),
        out=_prepared_matrix(spec, weights, f"{name}.out"),
        query_norm=weights[f"{name}.query_norm"],
        key_norm=weights[f"{name}.key_norm"],
    )
    if spec.parallel_dense:
        return ParallelLayer(
            spec,
            attention=attention,
            dense=_dense(spec, weights, f"{name}.shared"),
            feed_forward=_feed_forward(spec, layer, weights, store),
            **{part: weights[f"{name}.{part}"] for part in PARALLEL_VECTORS},
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
        return _dense(spec, weights, f"{name}.dense")
    gate, bias = _prepared_matrix(spec, weights, f"{name}.gate"), weights.get(f"{name}.gate_bias")
    if spec.parallel_dense:
        norms = weights[f"{name}.gate_norm"] * spec.hidden**-0.5, weights[f"{name}.expert_norm"]
        scale = weights[f"{name}.expert_scale"]
        return MoE(spec, layer, gate, bias, None, store, norms, scale)
    shared = _dense(spec, weights, f"{name}.shared") if spec.shared_width else None
    return MoE(spec, layer, gate, bias, shared, store)


def _dense(spec: ModelSpec, weights: dict[str, Tensor], name: str) -> Dense:
    gate_up, down = (
        _prepared_matrix(spec, weights, f"{name}.{part}") for part in ("gate_up", "down")
    )
    return Dense(gate_up, down, spec.activation)


def _prepared_matrix(spec: ModelSpec, weights: dict[str, Tensor], name: str) -> Matrix:
    if (form := quant_format(spec, name)) is not None:
        values, scales = weights.pop(f"{name}.q"), weights.pop(f"{name}.scales")
        return ops.prepare_matrix(
            QTensor(values, scales, form, values.shape[-1]), release_source=True
        )
    if weights["embedding"].dtype != torch.bfloat16:
        return weights[name]
    return ops.prepare_matrix(weights.pop(name), release_source=True)
