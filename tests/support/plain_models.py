"""LLaDA2.2 and DiffusionGemma as their descriptions say, in short and slow code of its own.

Weights have their published names. Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms(x: Tensor, weight: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return normed if weight is None else normed * weight


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [N, heads, D] by angles [N, R]: feature i < R turns with feature i + R."""
    size = angles.shape[-1]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[N, heads * D] of query [N, heads, D], key and value [M, kv heads, D], and seen [N, M]."""
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
    scores = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", scores, value).flatten(1)


@dataclass
class PlainModel:
    """Weights by name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = self.activate(self.linear(x, f"{name}.gate_proj"))
        return self.linear(gate * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def activate(self, x: Tensor) -> Tensor:
        return F.silu(x)


@dataclass
class PlainLLaDA22(PlainModel):
    """One forward of whole sequences, causal between blocks."""

    def logits(self, tokens: Tensor) -> Tensor:
        """[N] -> [N, V]."""
        config, names = self.config, self.tensors
        x = names["model.word_embeddings.weight"][tokens]
        for layer in range(config["num_hidden_layers"]):
            stem = f"model.layers.{layer}"
            normed = rms(x, names[f"{stem}.input_layernorm.weight"])
            x = x + self.attention(normed, f"{stem}.attention")
            normed = rms(x, names[f"{stem}.post_attention_layernorm.weight"])
            is_dense = layer < config["first_k_dense_replace"]
            x = x + (self.mlp if is_dense else self.experts)(normed, f"{stem}.mlp")
        x = rms(x, names["model.norm.weight"])
        head = "model.word_embeddings" if config["tie_word_embeddings"] else "lm_head"
        return self.linear(x, head)

    def attention(self, x: Tensor, name: str) -> Tensor:
        config, count = self.config, len(x)
        heads, kv_heads, dim = (
            config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        qkv = self.linear(x, f"{name}.query_key_value").unflatten(-1, (-1, dim))
        query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
        turning = int(dim * config["partial_rotary_factor"])
        frequency = config["rope_theta"] ** -(torch.arange(0, turning, 2) / turning)
        angles = torch.arange(count)[:, None] * frequency
        query = rotate(rms(query, self.tensors[f"{name}.query_layernorm.weight"]), angles)
        key = rotate(rms(key, self.tensors[f"{name}.key_layernorm.weight"]), angles)
        block = torch.arange(count) // config["block_size"]
        seen = block[None] <= block[:, None]
        return self.linear(attend(query, key, value, seen, dim**-0.5), f"{name}.dense")

    def experts(self, x: Tensor, name: str) -> Tensor:
        config, k = self.config, self.config["num_experts_per_tok"]
        score = torch.sigmoid(self.linear(x, f"{name}.gate"))
        biased = score + self.tensors[f"{name}.gate.expert_bias"]
        out = torch.zeros_like(x)
        if config["num_shared_experts"]:
            out = out + self.mlp(x, f"{name}.shared_experts")
        for first in range(0, len(x), config["block_size"]):
            tokens = range(first, min(len(x), first + config["block_size"]))
            best = biased[tokens.start : tokens.stop].amax(0)
            admitted = best.argsort(descending=True, stable=True)[: config["expert_capacity"]]
            for token in tokens:
                order = biased[token, admitted].argsort(descending=True, stable=True)[:k]
                chosen = admitted[order]
                weights = score[token, chosen] / (score[token, chosen].sum() + 1e-20)
                for expert, weight in zip(chosen.tolist(), weights, strict=True):
                    y = self.mlp(x[token], f"{name}.experts.{expert}")
                    out[token] += config["routed_scaling_factor"] * weight * y
        return out


@dataclass
class PlainGemma(PlainModel):
    """An encoder that keeps keys and values [M, kv heads, D] of each layer, and a decoder."""

    past: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    length: int = 0

    @property
    def text(self) -> Mapping[str, Any]:
        return self.config["text_config"]

    def activate(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def encode(self, tokens: Tensor) -> None:
        """Appends tokens to the prefix."""
        x = self.embed(tokens)
        for layer in range(self.text["num_hidden_layers"]):
            x = self.layer(x, layer, encodes=True)
        self.length += len(tokens)

    def decode(self, canvas: Tensor, last: Tensor | None) -> Tensor:
        """Logits [N, V] of a canvas [N] after the prefix; ``last`` are logits over temperature."""
        x, stem = self.embed(canvas), "model.decoder"
        if last is not None:
            table = self.tensors[f"{stem}.embed_tokens.weight"]
            expected = last.softmax(-1) @ table * math.sqrt(self.text["hidden_size"])
            normed = rms(expected, self.tensors[f"{stem}.self_conditioning.pre_norm.weight"])
            x = x + self.mlp(normed, f"{stem}.self_conditioning")
        x = rms(x)
        for layer in range(self.text["num_hidden_layers"]):
            x = self.layer(x, layer, encodes=False)
        z = self.linear(rms(x, self.tensors[f"{stem}.norm.weight"]), f"{stem}.embed_tokens")
        cap = self.text["final_logit_softcapping"]
        return cap * torch.tanh(z / cap)

    def embed(self, tokens: Tensor) -> Tensor:
        table = self.tensors["model.decoder.embed_tokens.weight"]
        return table[tokens] * math.sqrt(self.text["hidden_size"])

    def layer(self, x: Tensor, layer: int, *, encodes: bool) -> Tensor:
        stem = f"model.decoder.layers.{layer}"

        def norm(x: Tensor, name: str) -> Tensor:
            return rms(x, self.tensors[f"{stem}.{name}.weight"])

        attended = self.attention(norm(x, "input_layernorm"), layer, encodes=encodes)
        x = x + norm(attended, "post_attention_layernorm")
        dense = self.mlp(norm(x, "pre_feedforward_layernorm"), f"{stem}.mlp")
        routed = self.experts(x, norm(x, "pre_feedforward_layernorm_2"), stem)
        both = norm(dense, "post_feedforward_layernorm_1")
        both = both + norm(routed, "post_feedforward_layernorm_2")
        owner = "model.encoder.language_model" if encodes else "model.decoder"
        scalar = self.tensors[f"{owner}.layers.{layer}.layer_scalar"]
        return (x + norm(both, "post_feedforward_layernorm")) * scalar

    def attention(self, x: Tensor, layer: int, *, encodes: bool) -> Tensor:
        text, count, name = self.text, len(x), f"model.decoder.layers.{layer}.self_attn"
        is_full = text["layer_types"][layer] == "full_attention"
        own = text["per_layer_config"].get(str(layer), {})
        dim = own.get("head_dim", text["head_dim"])
        query = self.linear(x, f"{name}.q_proj").unflatten(-1, (-1, dim))
        key = self.linear(x, f"{name}.k_proj").unflatten(-1, (-1, dim))
        value = key if is_full else self.linear(x, f"{name}.v_proj").unflatten(-1, (-1, dim))
        positions = torch.arange(self.length, self.length + count)
        angles = positions[:, None] * self.frequencies(dim, is_full=is_full)
        query = rotate(rms(query, self.tensors[f"{name}.q_norm.weight"]), angles)
        key = rotate(rms(key, self.tensors[f"{name}.k_norm.weight"]), angles)
        key, value = self.with_past(layer, key, rms(value), keep=encodes)
        at = torch.arange(self.length + count)[None]
        last = positions[:, None] if encodes else positions[-1:, None].expand(count, 1)
        first = positions[:, None] if encodes else positions[:1, None].expand(count, 1)
        seen = at <= last
        if not is_full:
            seen = seen & (at > first - text["sliding_window"])
        return self.linear(attend(query, key, value, seen, 1.0), f"{name}.o_proj")

    def with_past(
        self, layer: int, key: Tensor, value: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor]:
        if layer in self.past:
            past = self.past[layer]
            key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
        if keep:
            self.past[layer] = (key, value)
        return key, value

    def frequencies(self, dim: int, *, is_full: bool) -> Tensor:
        kind = "full_attention" if is_full else "sliding_attention"
        rope = self.text["rope_parameters"][kind]
        frequency = rope["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
        if is_full:
            frequency[int(rope["partial_rotary_factor"] * dim) // 2 :] = 0
        return frequency

    def experts(self, raw: Tensor, x: Tensor, stem: str) -> Tensor:
        router = {
            name: self.tensors[f"{stem}.router.{name}"] for name in ("scale", "per_expert_scale")
        }
        scaled = rms(raw) * router["scale"] * self.text["hidden_size"] ** -0.5
        share = self.linear(scaled, f"{stem}.router.proj").softmax(-1)
        out = torch.zeros_like(x)
        for token in range(len(x)):
            chosen = share[token].argsort(descending=True, stable=True)[
                : self.text["top_k_experts"]
            ]
            for expert in chosen.tolist():
                gate, up = (self.tensors[f"{stem}.experts.gate_up_proj"][expert] @ x[token]).chunk(
                    2
                )
                y = self.tensors[f"{stem}.experts.down_proj"][expert] @ (self.activate(gate) * up)
                weight = share[token, expert] / share[token, chosen].sum()
                out[token] += weight * router["per_expert_scale"][expert] * y
        return out


def accepted_by_entropy(entropy: Tensor, bound: float) -> list[int]:
    """1 for each position, in rising order, while the entropy of those before is in the bound."""
    kept, before = [0] * len(entropy), 0.0
    for position in entropy.argsort(stable=True).tolist():
        kept[position] = int(before <= bound)
        before += float(entropy[position])
    return kept
