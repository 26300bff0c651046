"""The embedded model as it is trained: LLaDA2's architecture, laid out for a fast step.

Shapes: B rows, L positions, T = B*L tokens, H hidden, D head, I width, E experts, k per token.
Every matrix is stored [n, rows, columns] so that the optimiser sees one batch of small matrices:
attention by head, experts as (gate, up, down transposed). ``official`` gives the checkpoint's view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.keys import Key
from coterie.training.attend import attend
from coterie.training.experts import run_experts


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaDA2 model. The defaults are those of the embedded one."""

    vocabulary: Annotated[int, Key("vocabulary")] = 300
    hidden: Annotated[int, Key("hidden")] = 128
    layers: Annotated[int, Key("layers")] = 5
    heads: Annotated[int, Key("heads")] = 4
    kv_heads: Annotated[int, Key("kv_heads")] = 4
    head: Annotated[int, Key("head")] = 32
    rotary: Annotated[float, Key("rotary")] = 0.5  # the part of a head that turns
    theta: Annotated[float, Key("theta")] = 10_000.0
    dense_layers: Annotated[int, Key("dense_layers")] = 1
    dense_width: Annotated[int, Key("dense_width")] = 384
    experts: Annotated[int, Key("experts")] = 128
    k: Annotated[int, Key("k")] = 8
    groups: Annotated[int, Key("groups")] = 8
    kept_groups: Annotated[int, Key("kept_groups")] = 4
    width: Annotated[int, Key("width")] = 32
    shared: Annotated[int, Key("shared")] = 1
    scale: Annotated[float, Key("scale")] = 2.5
    epsilon: Annotated[float, Key("epsilon")] = 1e-6
    block: Annotated[int, Key("block")] = 32
    length: Annotated[int, Key("length")] = 2048


def visibility(visible: Tensor, block: int) -> Tensor:
    """Block visibility [B, n, n] as an additive mask [B, 1, L, L] in fp32."""
    full = visible.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return torch.where(full, 0.0, -torch.inf)[:, None]


class Network(nn.Module):
    """Tokens to logits, with gradients. ``precision`` is the type that products run in."""

    def __init__(
        self, shape: Shape, *, seed: int = 0, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.shape, self.precision = shape, precision
        draw = torch.Generator().manual_seed(seed)
        self.embeddings = nn.Parameter(torch.randn(shape.vocabulary, shape.hidden, generator=draw))
        self._layers = [_Layer(shape, i, draw) for i in range(shape.layers)]
        self.layers = nn.ModuleList(self._layers)
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.head = nn.Parameter(torch.zeros(shape.vocabulary, shape.hidden))

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [P, V] in fp32 at the flat positions ``wanted`` (None: all), and loads [moe, E].

        tokens, positions [B, L]; mask [B, 1, L, L] additive.
        """
        shape = self.shape
        turn = _turns(positions, shape)
        x = F.embedding(tokens.flatten(), self.embeddings)  # [T, H]
        loads = []
        for layer in self._layers:
            x, load = layer(x, turn, mask, self.precision)
            loads += [] if load is None else [load]
        x = x if wanted is None else x.index_select(0, wanted)
        x = F.rms_norm(x, (shape.hidden,), self.norm, shape.epsilon)
        logits = F.linear(x.to(self.precision), self.head.to(self.precision)).float()
        empty = torch.zeros(0, shape.experts, dtype=torch.int64)
        return logits, torch.stack(loads) if loads else empty

    def biases(self) -> list[Tensor]:
        """The selection bias [E] of each MoE layer, in order."""
        return [layer.mlp.bias for layer in self._layers if isinstance(layer.mlp, _MoE)]

    def matrices(self) -> list[nn.Parameter]:
        """The parameters [..., rows, columns] whose last two dimensions are one map each."""
        return [p for layer in self._layers for p in layer.matrices()]

    def official(self) -> dict[str, Tensor]:
        """Every weight under its name in the checkpoint, as views that can be read and written."""
        names = {
            "model.word_embeddings.weight": self.embeddings.data,
            "model.norm.weight": self.norm.data,
            "lm_head.weight": self.head.data,
        }
        for i, layer in enumerate(self._layers):
            names |= {f"model.layers.{i}.{name}": w for name, w in layer.official().items()}
        return names


class _Layer(nn.Module):
    def __init__(self, shape: Shape, index: int, draw: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        hidden, head, rows = shape.hidden, shape.head, shape.heads + 2 * shape.kv_heads
        self.norm_in = nn.Parameter(torch.ones(hidden))
        self.norm_mid = nn.Parameter(torch.ones(hidden))
        self.norm_query = nn.Parameter(torch.ones(head))
        self.norm_key = nn.Parameter(torch.ones(head))
        self.qkv = nn.Parameter(_uniform((rows, head, hidden), hidden, draw))
        self.out = nn.Parameter(torch.zeros(shape.heads, head, hidden))  # transposed, by head
        dense = index < shape.dense_layers
        self.mlp = _Dense(hidden, shape.dense_width, draw) if dense else _MoE(shape, draw)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, precision: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        hidden, epsilon = (self.shape.hidden,), self.shape.epsilon
        x = x + self._attend(F.rms_norm(x, hidden, self.norm_in, epsilon).to(precision), turn, mask)
        mixed, load = self.mlp(F.rms_norm(x, hidden, self.norm_mid, epsilon), precision)
        return x + mixed, load

    def _attend(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        shape, rows = self.shape, mask.shape[0]
        heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        qkv = F.linear(x, self.qkv.to(x.dtype).flatten(0, 1)).view(rows, -1, sum(heads), shape.head)
        q, k, v = qkv.transpose(1, 2).split(heads, 1)  # [B, heads, L, D]
        q = _rotate(F.rms_norm(q.float(), (shape.head,), self.norm_query, shape.epsilon), turn)
        k = _rotate(F.rms_norm(k.float(), (shape.head,), self.norm_key, shape.epsilon), turn)
        k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, 1) for t in (k, v))
        mixed = attend(q.to(x.dtype), k.to(x.dtype), v.contiguous(), mask)
        return mixed.transpose(1, 2).reshape(len(x), -1) @ self.out.to(x.dtype).flatten(0, 1)

    def matrices(self) -> list[nn.Parameter]:
        return [self.qkv, self.out, *self.mlp.matrices()]

    def official(self) -> dict[str, Tensor]:
        return {
            "input_layernorm.weight": self.norm_in.data,
            "post_attention_layernorm.weight": self.norm_mid.data,
            "attention.query_layernorm.weight": self.norm_query.data,
            "attention.key_layernorm.weight": self.norm_key.data,
            "attention.query_key_value.weight": self.qkv.data.flatten(0, 1),
            "attention.dense.weight": self.out.data.flatten(0, 1).T,
            **{f"mlp.{name}": weight for name, weight in self.mlp.official().items()},
        }


class _Dense(nn.Module):
    def __init__(self, hidden: int, width: int, draw: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(_expert((width, hidden), draw))

    def forward(self, x: Tensor, precision: torch.dtype) -> tuple[Tensor, None]:
        return _swiglu(x.to(precision), self.weight), None

    def matrices(self) -> list[nn.Parameter]:
        return [self.weight]

    def official(self) -> dict[str, Tensor]:
        return _three("", self.weight.data)


class _MoE(nn.Module):
    bias: Tensor

    def __init__(self, shape: Shape, draw: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        hidden, width = shape.hidden, shape.width
        self.gate = nn.Parameter(_uniform((shape.experts, hidden), hidden, draw))
        self.register_buffer("bias", torch.zeros(shape.experts))
        self.experts = nn.Parameter(
            torch.stack([_expert((width, hidden), draw) for _ in range(shape.experts)])
        )
        self.shared = nn.Parameter(_expert((width * shape.shared, hidden), draw))

    def forward(self, x: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        ids, weights = choose(x @ self.gate.T, self.bias, self.shape)
        low = x.to(precision)
        mixed, load = run_experts(low, weights, ids, self.experts)
        return mixed + _swiglu(low, self.shared) if self.shape.shared else mixed, load

    def matrices(self) -> list[nn.Parameter]:
        return [self.experts, self.shared]

    def official(self) -> dict[str, Tensor]:
        names = {"gate.weight": self.gate.data, "gate.expert_bias": self.bias}
        for e in range(self.shape.experts):
            names |= _three(f"experts.{e}.", self.experts.data[e])
        return names | (_three("shared_experts.", self.shared.data) if self.shape.shared else {})


def choose(logits: Tensor, bias: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Experts [T, k] by biased score inside the best groups, and their weights without the bias."""
    probability = torch.sigmoid(logits)  # [T, E] fp32
    with torch.no_grad():
        score = (probability + bias).view(len(logits), shape.groups, -1)
        first = score.amax(-1, keepdim=True)
        second = score.masked_fill(score == first, -torch.inf).amax(-1)
        group = first.squeeze(-1) + second  # [T, G]
        # Counting the better groups is several times faster here than sorting them.
        better = (group[:, None, :] > group[:, :, None]).sum(-1)
        open_score = score.masked_fill((better >= shape.kept_groups)[..., None], -torch.inf)
        ids = open_score.flatten(1).topk(shape.k, sorted=False).indices
    weight = probability.gather(1, ids)
    return ids, weight * (shape.scale / (weight.sum(-1, keepdim=True) + 1e-20))


def _swiglu(x: Tensor, weight: Tensor) -> Tensor:
    low = weight.to(x.dtype)
    gate, up = F.linear(x, low[:2].flatten(0, 1)).chunk(2, -1)
    return (F.silu(gate) * up) @ low[2]


def _turns(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, L, rotary] of every position."""
    size = int(shape.head * shape.rotary)
    powers = torch.arange(0, size, 2, device=positions.device).float() / size
    angle = positions[:, None, :, None].float() / shape.theta**powers
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = turn
    size = cosine.shape[-1]
    part, rest = x[..., :size], x[..., size:]
    half = torch.cat([-part[..., size // 2 :], part[..., : size // 2]], -1)
    return torch.cat([part * cosine + half * sine, rest], -1)


def _uniform(size: tuple[int, ...], inputs: int, draw: torch.Generator) -> Tensor:
    bound = 0.5 * math.sqrt(3 / inputs)
    return torch.empty(size).uniform_(-bound, bound, generator=draw)


def _expert(size: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Gate, up, down transposed [3, I, H]; down starts at zero: a layer starts as nothing."""
    matrices = _uniform((3, *size), size[1], draw)
    matrices[2] = 0
    return matrices


def _three(prefix: str, matrices: Tensor) -> dict[str, Tensor]:
    gate, up, down = matrices
    return {
        f"{prefix}gate_proj.weight": gate,
        f"{prefix}up_proj.weight": up,
        f"{prefix}down_proj.weight": down.T,
    }
