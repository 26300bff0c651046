"""Grouped-query attention over keys written by position, and what all layers of a forward share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie import ops
from coterie.model.cache import Cache, positions
from coterie.model.spec import ModelSpec
from coterie.values import KeyValues, Matrix, PackedMatrix, Sight, Window


@dataclass(frozen=True)
class View:
    """What every layer of one forward sees alike."""

    sight: Sight
    mask: Tensor | None  # [B, W, reach] bool, True = may attend; None = all of it

    @property
    def positions(self) -> Tensor:
        return self.sight.positions

    @property
    def reach(self) -> int:
        return self.sight.reach

    @staticmethod
    def of(window: Window, cache: Cache | None, spec: ModelSpec, device: torch.device) -> View:
        """Windows come from the host, so their reach is known without asking the device."""
        where = positions(window, device)
        length = window.width if cache is None else cache.length
        reach = length
        if window.visible.device.type == "cpu":
            reach = min(length, int(window.visible.max()))
        turns = where[:, :, None, None].float() * _inverse_frequencies(spec, device)
        limits = _limits(window, where)
        sight = Sight(where, limits, reach, cos=turns.cos(), sin=turns.sin())
        return View(sight, _mask(window, limits, reach))


@dataclass(frozen=True)
class Attention:
    """One layer's attention; weights are stored [out, in]."""

    spec: ModelSpec
    layer: int
    qkv: Matrix  # [qkv_rows, H]: query heads, then keys, then values
    out: Matrix  # [H, heads * head_dim]
    query_norm: Tensor  # [head_dim]
    key_norm: Tensor  # [head_dim]

    def __call__(
        self, x: Tensor, view: View, cache: Cache | None, *, weigh: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, W, H] and, when asked to weigh, the mean attention each position receives.

        That mean is over heads and over the window's queries, [B, W] fp32.
        """
        if not weigh and (whole := self._whole(x, view, cache)) is not None:
            return whole, None
        heads = ops.linear(x, self.qkv).unflatten(-1, (-1, self.spec.head_dim))
        if not weigh and (mixed := self._fused(heads, view, cache)) is not None:
            return ops.linear(mixed.flatten(2), self.out), None
        query, key, value = self._heads(heads, view)
        if cache is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            cache.write(self.layer, view.positions, key, value)
            keys, values = cache.read(self.layer, view.reach)
        keys, values = keys[:, :, : view.reach], values[:, :, : view.reach]
        mixed = _attend(query, keys, values, view.mask)
        received = _received(query, keys, view) if weigh else None
        return ops.linear(mixed.flatten(2), self.out), received

    def _whole(self, x: Tensor, view: View, cache: Cache | None) -> Tensor | None:
        """[B, W, H] by one kernel from x on, where there is one."""
        if not isinstance(self.qkv, PackedMatrix):
            return None
        weights, norms = (self.qkv, self.out), (self.query_norm, self.key_norm)
        held = _fleeting(x, self.spec) if cache is None else cache.held(self.layer, len(x))
        epsilon = self.spec.norm_epsilon
        return ops.attention(x, weights, norms, sight=view.sight, held=held, epsilon=epsilon)

    def _fused(self, heads: Tensor, view: View, cache: Cache | None) -> Tensor | None:
        """Mixed values [B, W, heads, D] by one kernel, where there is one."""
        norms = (self.query_norm, self.key_norm)
        held = _fleeting(heads, self.spec) if cache is None else cache.held(self.layer, len(heads))
        return ops.attend(heads, norms, view.sight, held, self.spec.norm_epsilon)

    def _heads(self, heads: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, W, heads, D], key and value [B, W, kv_heads, D], normed and turned."""
        spec, sight = self.spec, view.sight
        query, key, value = heads.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=2)
        query = ops.rms_norm(query, self.query_norm, spec.norm_epsilon)
        key = ops.rms_norm(key, self.key_norm, spec.norm_epsilon)
        turns = (sight.cos, sight.sin)
        return rotate(query, *turns), rotate(key, *turns), value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first features of x [B, W, heads, D] by position; halves pair up, not neighbours."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _inverse_frequencies(spec: ModelSpec, device: torch.device) -> Tensor:
    steps = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / spec.rope_theta ** (steps / spec.rotary_dim)


def _limits(window: Window, where: Tensor) -> Tensor:
    """[B, W]: the query at ``where`` [B, W] may attend to keys before that position."""
    limit = window.visible.to(where.device, non_blocking=True)[:, None]
    if window.block:
        limit = torch.minimum(limit, (where // window.block + 1) * window.block)
    return limit.expand_as(where).contiguous()


def _mask(window: Window, limits: Tensor, reach: int) -> Tensor | None:
    """True where a query with these limits [B, W] may attend to a key, [B, W, reach]."""
    on_host = window.visible.device.type == "cpu"
    if window.block == 0 and on_host and bool((window.visible >= reach).all()):
        return None
    return torch.arange(reach, device=limits.device) < limits[:, :, None]


def _fleeting(x: Tensor, spec: ModelSpec) -> KeyValues:
    """Room for the keys and values of the window x [B, W, ..] alone."""
    rows, width = x.shape[:2]
    keys, values = x.new_zeros(2, rows, spec.kv_heads, width, spec.head_dim)
    return KeyValues(keys, values, torch.arange(rows, device=x.device))


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Mixed values [B, W, heads, D]. Heads that share keys queue as further queries: no copies."""
    batch, width, heads, dim = query.shape
    shared = heads // keys.shape[1]
    query = _by_key_head(query, keys.shape[1])
    if mask is not None:
        mask = mask[:, None].repeat(1, 1, shared, 1)
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    mixed = mixed.reshape(batch, heads, width, dim)
    return mixed.transpose(1, 2)


def _by_key_head(query: Tensor, kv_heads: int) -> Tensor:
    """[B, W, heads, D] -> [B, kv_heads, heads / kv_heads * W, D]."""
    return query.transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _received(query: Tensor, keys: Tensor, view: View) -> Tensor:
    """Mean attention that each of the window's positions receives, [B, W] fp32."""
    batch, width, heads, dim = query.shape
    scores = _by_key_head(query.float(), keys.shape[1]) @ keys.float().transpose(2, 3)
    scores = scores.reshape(batch, heads, width, -1) * dim**-0.5
    if view.mask is not None:
        scores = scores.masked_fill(~view.mask[:, None], float("-inf"))
    share = scores.softmax(dim=-1).mean(dim=(1, 2))  # [B, reach]
    return share.gather(1, view.positions)
