"""Grouped-query attention over a KV cache, and the metadata that all layers of a forward share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie import ops
from coterie.model.cache import KVCache, window_positions
from coterie.model.spec import AttentionSpec, ModelSpec
from coterie.values import LayerKV, Matrix, PackedMatrix, QueryPositions, Window

QUERIES_PER_PART = 512  # that attend together where there is a mask


@dataclass(frozen=True)
class AttentionMetadata:
    """Positions, key limits and mask of one forward, the same for all layers of one kind.

    No query sees a key before ``first_key``; the mask begins there.
    """

    queries: QueryPositions
    mask: Tensor | None  # [B, W, kv_length - first_key] bool, True = may attend; None = all keys
    first_key: int = 0

    @staticmethod
    def of(
        window: Window, cache: KVCache | None, spec: AttentionSpec, device: torch.device
    ) -> AttentionMetadata:
        """The metadata of a window; ``kv_length`` is read from the window, which is on the host."""
        position_ids = window_positions(window, device)
        length = window.width if cache is None else cache.length
        kv_length = length
        if window.visible.device.type == "cpu":
            kv_length = min(length, int(window.visible.max()))
        angles = position_ids[:, :, None, None].float() * _inverse_frequencies(spec, device)
        limits = _causal_limits(window, position_ids)
        queries = QueryPositions(
            position_ids, limits, kv_length, cos=angles.cos(), sin=angles.sin()
        )
        first_key = _first_key(window, spec, kv_length)
        mask = _attention_mask(window, limits, first_key, kv_length)
        if spec.window:
            mask = _sliding_mask(window, queries, spec.window, mask, first_key)
        return AttentionMetadata(queries, mask, first_key)


@dataclass(frozen=True)
class Attention:
    """One layer's attention; weights are stored [out, in]."""

    spec: ModelSpec
    layer: int
    qkv: Matrix  # [qkv_rows, H]: query heads, then keys, then values if they have a projection
    out: Matrix  # [H, heads * head_dim]
    query_norm: Tensor  # [head_dim]
    key_norm: Tensor  # [head_dim]

    @cached_property
    def kind(self) -> AttentionSpec:
        return self.spec.attention[self.layer]

    def __call__(
        self,
        x: Tensor,
        metadata: AttentionMetadata,
        cache: KVCache | None,
        *,
        return_received: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, W, H] and, with ``return_received``, the attention each position receives.

        Received attention is the mean over heads and the window's queries, [B, W] fp32.
        """
        fuse = self.kind.fits_kernels and not return_received
        if fuse and (output := self._fused_layer(x, metadata, cache)) is not None:
            return output, None
        heads = ops.linear(x, self.qkv).unflatten(-1, (-1, self.kind.head_dim))
        if fuse and (attn_output := self._fused_attention(heads, metadata, cache)) is not None:
            return ops.linear(attn_output.flatten(2), self.out), None
        queries = metadata.queries
        query, key, value = self._split_heads(heads, queries)
        if cache is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            cache.write(self.layer, queries.positions, key, value)
            keys, values = cache.read(self.layer, queries.kv_length)
        seen = slice(metadata.first_key, queries.kv_length)
        keys, values = keys[:, :, seen], values[:, :, seen]
        scale = self.kind.scale
        attn_output = _attend(query, keys, values, metadata.mask, scale)
        output = ops.linear(attn_output.flatten(2), self.out)
        return output, _received(query, keys, metadata, scale) if return_received else None

    def _fused_layer(
        self, x: Tensor, metadata: AttentionMetadata, cache: KVCache | None
    ) -> Tensor | None:
        """The whole layer [B, W, H] in one kernel call; None without such a kernel."""
        if not isinstance(self.qkv, PackedMatrix):
            return None
        weights, norms = (self.qkv, self.out), (self.query_norm, self.key_norm)
        kv, epsilon = self._layer_kv(x, cache), self.spec.norm_epsilon
        return ops.fused_attention_layer(
            x, weights, norms, queries=metadata.queries, kv=kv, epsilon=epsilon
        )

    def _fused_attention(
        self, heads: Tensor, metadata: AttentionMetadata, cache: KVCache | None
    ) -> Tensor | None:
        """Attention output [B, W, heads, D] in one kernel call; None without such a kernel."""
        norms = (self.query_norm, self.key_norm)
        kv, epsilon = self._layer_kv(heads, cache), self.spec.norm_epsilon
        return ops.fused_attention(heads, norms, metadata.queries, kv, epsilon)

    def _layer_kv(self, x: Tensor, cache: KVCache | None) -> LayerKV:
        """Where the window x [B, W, ..] stores its keys and values: the cache, or new memory."""
        if cache is not None:
            return cache.layer_kv(self.layer, len(x))
        rows, width = x.shape[:2]
        keys, values = x.new_zeros(2, rows, self.kind.kv_heads, width, self.kind.head_dim)
        return LayerKV(keys, values, torch.arange(rows, device=x.device))

    def _split_heads(self, heads: Tensor, queries: QueryPositions) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, W, heads, D], key and value [B, W, kv_heads, D], normed and rotated."""
        kind, epsilon, num_heads = self.kind, self.spec.norm_epsilon, self.spec.heads
        query, key, value = heads.tensor_split([num_heads, num_heads + kind.kv_heads], dim=2)
        value = key if kind.keys_are_values else value
        if kind.norms_values:
            value = ops.rms_norm(value, torch.ones_like(self.key_norm), epsilon)
        query = ops.rms_norm(query, self.query_norm, epsilon)
        key = ops.rms_norm(key, self.key_norm, epsilon)
        # PyTorch's attention gives 0 where all scores are NaN; NaN values it passes on.
        value = value + 0 * (key + query.mean(dim=2, keepdim=True))
        rotation = (queries.cos, queries.sin)
        return rotate(query, *rotation), rotate(key, *rotation), value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first features of x [B, W, heads, D], in pairs of one feature of each half."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _inverse_frequencies(spec: AttentionSpec, device: torch.device) -> Tensor:
    steps = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / spec.rope_theta ** (steps / spec.rotary_dim)
    if spec.rope_angles:
        frequencies[spec.rope_angles :] = 0.0
    return frequencies


def _causal_limits(window: Window, position_ids: Tensor) -> Tensor:
    """[B, W]: the query at ``position_ids`` [B, W] may attend to keys before this position."""
    limit = window.visible.to(position_ids.device, non_blocking=True)[:, None]
    if window.block:
        limit = torch.minimum(limit, (position_ids // window.block + 1) * window.block)
    return limit.expand_as(position_ids).contiguous()


def _first_key(window: Window, spec: AttentionSpec, kv_length: int) -> int:
    """The first key that a query of the window sees, as far as the host knows."""
    if not spec.window or window.start.device.type != "cpu":
        return 0
    first = int(window.start.min())
    if window.block:
        first = first // window.block * window.block
    return max(0, min(first - spec.window + 1, kv_length - 1))


def _attention_mask(
    window: Window, limits: Tensor, first_key: int, kv_length: int
) -> Tensor | None:
    """True where a query with these limits [B, W] may attend to a key from ``first_key`` on."""
    on_host = window.visible.device.type == "cpu"
    if window.block == 0 and on_host and bool((window.visible >= kv_length).all()):
        return None
    return torch.arange(first_key, kv_length, device=limits.device) < limits[:, :, None]


def _sliding_mask(
    window: Window, queries: QueryPositions, width: int, mask: Tensor | None, first_key: int
) -> Tensor | None:
    """The mask without keys further back than ``width`` - 1 before the query's block.

    All positions of a causal block see the same first key; without blocks the window is the block.
    """
    positions, block, start = queries.positions, window.block, window.start
    if not block and start.device.type == "cpu" and int(start.max()) - width < first_key:
        return mask  # every row sees all keys from the first one on
    first = positions // block * block if block else positions[:, :1]
    keys = torch.arange(first_key, queries.kv_length, device=positions.device)
    inside = keys > (first - width)[:, :, None]
    return (inside if mask is None else mask & inside).expand(*positions.shape, -1)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention output [B, W, heads, D] of query [B, W, heads, D].

    Under a mask some queries at a time attend to the keys that any of them sees. This bounds the
    memory of a long prompt.
    """
    if mask is None or query.shape[1] <= QUERIES_PER_PART:
        return _sdpa(query, keys, values, mask, scale)
    parts = []
    for start in range(0, query.shape[1], QUERIES_PER_PART):
        part = slice(start, start + QUERIES_PER_PART)
        seen = _seen_keys(mask[:, part])
        span = keys[:, :, seen], values[:, :, seen]
        parts.append(_sdpa(query[:, part], *span, mask[:, part, seen], scale))
    return torch.cat(parts, dim=1)


def _seen_keys(mask: Tensor) -> slice:
    """From the first to the last key that a query sees; all of them on a GPU, without a wait."""
    if mask.device.type != "cpu":
        return slice(None)
    seen = mask.flatten(0, 1).any(dim=0).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(None)


def _sdpa(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention output [B, W, heads, D].

    Query heads that share a KV head are treated as further queries, which avoids copies of keys.
    """
    batch, width, heads, dim = query.shape
    queries_per_kv_head = heads // keys.shape[1]
    query = _group_by_kv_head(query, keys.shape[1])
    if mask is not None:
        mask = mask[:, None].repeat(1, 1, queries_per_kv_head, 1)
    attn_output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    attn_output = attn_output.reshape(batch, heads, width, dim)
    return attn_output.transpose(1, 2)


def _group_by_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """[B, W, heads, D] -> [B, kv_heads, heads / kv_heads * W, D]."""
    return query.transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _received(
    query: Tensor, keys: Tensor, metadata: AttentionMetadata, scale: float | None
) -> Tensor:
    """Mean attention that each of the window's positions receives, [B, W] fp32."""
    batch, width, heads, dim = query.shape
    scores = _group_by_kv_head(query.float(), keys.shape[1]) @ keys.float().transpose(2, 3)
    scores = scores.reshape(batch, heads, width, -1) * (dim**-0.5 if scale is None else scale)
    if metadata.mask is not None:
        scores = scores.masked_fill(~metadata.mask[:, None], float("-inf"))
    share = scores.softmax(dim=-1).mean(dim=(1, 2))  # [B, kv_length - first_key]
    return share.gather(1, metadata.queries.positions - metadata.first_key)
