"""The LLaDA2 architecture for training, with a layout for fast optimizer steps.

Shapes: B rows, L positions, T = B*L tokens, H hidden, D head, I width, E experts, k per token,
R pairs of token and expert, sorted by expert.
Matrices are stored as [n, rows, columns], so that the optimizer gets batches of small matrices:
attention by head, experts as (gate, up, down transposed). ``checkpoint_tensors`` are views in the
official layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.keys import Key
from coterie.model.attention import rotate

# Each expert's rows are padded to a multiple of this. The bf16 matmul library compiles a kernel per
# size, and would otherwise compile new ones in every step.
ROW_ALIGNMENT = {torch.bfloat16: 32, torch.float32: 8}


@dataclass(frozen=True)
class NetworkShape:
    """The sizes of a LLaDA2 model. The defaults are those of the embedded model.

    A second name is that of ``config.json``.
    """

    vocab_size: Annotated[int, Key("vocabulary", "vocab_size")] = 300
    hidden_size: Annotated[int, Key("hidden", "hidden_size")] = 128
    layers: Annotated[int, Key("layers", "num_hidden_layers")] = 5
    heads: Annotated[int, Key("heads", "num_attention_heads")] = 4
    kv_heads: Annotated[int, Key("kv_heads", "num_key_value_heads")] = 4
    head_dim: Annotated[int, Key("head", "head_dim")] = 32
    # Of a head, with rotary embedding.
    rotary_fraction: Annotated[float, Key("rotary", "partial_rotary_factor")] = 0.5
    rope_theta: Annotated[float, Key("theta", "rope_theta")] = 10_000.0
    dense_layers: Annotated[int, Key("dense_layers", "first_k_dense_replace")] = 1
    dense_width: Annotated[int, Key("dense_width", "intermediate_size")] = 384
    experts: Annotated[int, Key("experts", "num_experts")] = 128
    k: Annotated[int, Key("k", "num_experts_per_tok")] = 8
    groups: Annotated[int, Key("groups", "n_group")] = 8
    topk_groups: Annotated[int, Key("kept_groups", "topk_group")] = 4
    expert_width: Annotated[int, Key("width", "moe_intermediate_size")] = 32
    shared_experts: Annotated[int, Key("shared", "num_shared_experts")] = 1
    routed_scale: Annotated[float, Key("scale", "routed_scaling_factor")] = 2.5
    epsilon: Annotated[float, Key("epsilon", "rms_norm_eps")] = 1e-6
    block: Annotated[int, Key("block")] = 32
    max_length: Annotated[int, Key("length", "max_position_embeddings")] = 2048


class ExpertOrder(NamedTuple):
    """Rows sorted by expert, padded to a multiple of the alignment per expert."""

    pair_index: Tensor  # [R] int64: the flat (token, choice) of each row; T*k for padding
    row_index: Tensor  # [T, k] int64: the row of each (token, choice)
    expert_ends: Tensor  # [E] int32: the end of each expert's rows
    counts: Tensor  # [E] int64, without padding


class AttentionGroup(NamedTuple):
    """Query blocks, the key blocks that they see, and the additive mask [B, 1, q, k] of both."""

    queries: Tensor
    keys: Tensor
    mask: Tensor


def attention_groups(block_mask: Tensor, block: int) -> list[AttentionGroup]:
    """Query blocks with as many visible blocks [B, n, n] form a group, if all rows are alike."""
    first, every = block_mask[0], torch.arange(block_mask.shape[1])
    if not (block_mask == first).all():
        return [AttentionGroup(every, every, additive_mask(block_mask, block))]
    counts = first.sum(-1)
    groups = []
    for queries in (every[counts == count] for count in counts.unique()):
        keys = every[first[queries].any(0)]
        visible = first[queries][:, keys].repeat_interleave(block, 0).repeat_interleave(block, 1)
        groups.append(
            AttentionGroup(queries, keys, torch.where(visible, 0.0, -torch.inf)[None, None])
        )
    return groups


def additive_mask(block_mask: Tensor, block: int) -> Tensor:
    """Block visibility [B, n, n] as an additive mask [B, 1, L, L] in fp32."""
    full = block_mask.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return torch.where(full, 0.0, -torch.inf)[:, None]


class TrainingNetwork(nn.Module):
    """The trainable model. ``precision`` is the dtype of its matmuls."""

    def __init__(
        self, shape: NetworkShape, *, seed: int = 0, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.shape, self.precision = shape, precision
        generator = torch.Generator().manual_seed(seed)
        self.embeddings = nn.Parameter(
            torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
        )
        self._layers = [_TrainingLayer(shape, i, generator) for i in range(shape.layers)]
        self.layers = nn.ModuleList(self._layers)
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        self.head = nn.Parameter(torch.zeros(shape.vocab_size, shape.hidden_size))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        groups: Sequence[AttentionGroup],
        logits_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """fp32 logits [P, V] at flat positions ``logits_indices`` (None: all), and loads [moe, E].

        tokens, positions [B, L].
        """
        shape = self.shape
        rope = _rope_tables(positions, shape)
        x = F.embedding(tokens.flatten(), self.embeddings)  # [T, H]
        loads = []
        for layer in self._layers:
            x, load = layer(x, rope, groups, self.precision)
            loads += [] if load is None else [load]
        x = x if logits_indices is None else x.index_select(0, logits_indices)
        x = _norm(x, self.norm, shape.epsilon)
        logits = F.linear(x.to(self.precision), self.head.to(self.precision)).float()
        empty = torch.zeros(0, shape.experts, dtype=torch.int64)
        return logits, torch.stack(loads) if loads else empty

    def biases(self) -> list[Tensor]:
        """The selection bias [E] of each MoE layer, in order."""
        return [layer.mlp.bias for layer in self._layers if isinstance(layer.mlp, _MoE)]

    def matrices(self) -> list[nn.Parameter]:
        """The parameters [..., rows, columns] that Muon updates, as batches of matrices."""
        return [parameter for parameter in self.parameters() if parameter.ndim > 2]

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Writable views of all weights, by their names in the checkpoint."""
        names = {
            "model.word_embeddings.weight": self.embeddings.data,
            "model.norm.weight": self.norm.data,
            "lm_head.weight": self.head.data,
        }
        for i, layer in enumerate(self._layers):
            names |= {
                f"model.layers.{i}.{name}": w for name, w in layer.checkpoint_tensors().items()
            }
        return names


class _TrainingLayer(nn.Module):
    def __init__(self, shape: NetworkShape, index: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        hidden, head, rows = shape.hidden_size, shape.head_dim, shape.heads + 2 * shape.kv_heads
        self.norm_in = nn.Parameter(torch.ones(hidden))
        self.norm_mid = nn.Parameter(torch.ones(hidden))
        self.norm_query = nn.Parameter(torch.ones(head))
        self.norm_key = nn.Parameter(torch.ones(head))
        self.qkv = nn.Parameter(_uniform((rows, head, hidden), hidden, generator))
        self.out = nn.Parameter(torch.zeros(shape.heads, head, hidden))  # transposed, by head
        dense = index < shape.dense_layers
        self.mlp = _Dense(hidden, shape.dense_width, generator) if dense else _MoE(shape, generator)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        groups: Sequence[AttentionGroup],
        precision: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        epsilon = self.shape.epsilon
        x = x + self._attention(_norm(x, self.norm_in, epsilon).to(precision), rope, groups)
        output, load = self.mlp(_norm(x, self.norm_mid, epsilon), precision)
        return x + output, load

    def _attention(
        self, x: Tensor, rope: tuple[Tensor, Tensor], groups: Sequence[AttentionGroup]
    ) -> Tensor:
        shape, rows = self.shape, len(rope[0])
        heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        qkv = F.linear(x, self.qkv.to(x.dtype).flatten(0, 1)).view(
            rows, -1, sum(heads), shape.head_dim
        )
        q, k, v = qkv.transpose(1, 2).split(heads, 1)  # [B, heads, L, D]
        q = rotate(_norm(q.float(), self.norm_query, shape.epsilon), *rope)
        k = rotate(_norm(k.float(), self.norm_key, shape.epsilon), *rope)
        k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, 1) for t in (k, v))
        output = _grouped_attention(q.to(x.dtype), k.to(x.dtype), v, groups)
        return output.transpose(1, 2).reshape(len(x), -1) @ self.out.to(x.dtype).flatten(0, 1)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return {
            "input_layernorm.weight": self.norm_in.data,
            "post_attention_layernorm.weight": self.norm_mid.data,
            "attention.query_layernorm.weight": self.norm_query.data,
            "attention.key_layernorm.weight": self.norm_key.data,
            "attention.query_key_value.weight": self.qkv.data.flatten(0, 1),
            "attention.dense.weight": self.out.data.flatten(0, 1).T,
            **{f"mlp.{name}": weight for name, weight in self.mlp.checkpoint_tensors().items()},
        }


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[AttentionGroup]) -> Tensor:
    """Attention [B, heads, L, D] of each group's queries over the group's keys."""
    if len(groups) == 1:
        return F.scaled_dot_product_attention(q, k, v, groups[0].mask.to(q.dtype))
    num_blocks = sum(len(group.queries) for group in groups)
    q, k, v = (t.unflatten(2, (num_blocks, -1)) for t in (q, k, v))
    outputs = [
        F.scaled_dot_product_attention(
            q.index_select(2, group.queries).flatten(2, 3),
            k.index_select(2, group.keys).flatten(2, 3),
            v.index_select(2, group.keys).flatten(2, 3),
            group.mask.to(q.dtype),
        )
        for group in groups
    ]
    order = torch.cat([group.queries for group in groups]).argsort()
    blocks = torch.cat(outputs, 2).unflatten(2, (num_blocks, -1))
    return blocks.index_select(2, order).flatten(2, 3)


class _Dense(nn.Module):
    def __init__(self, hidden: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(_init_expert((width, hidden), generator))

    def forward(self, x: Tensor, precision: torch.dtype) -> tuple[Tensor, None]:
        return _swiglu(x.to(precision), self.weight), None

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return _projection_tensors("", self.weight.data)


class _MoE(nn.Module):
    bias: Tensor

    def __init__(self, shape: NetworkShape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        hidden, width = shape.hidden_size, shape.expert_width
        self.gate = nn.Parameter(_uniform((shape.experts, hidden), hidden, generator))
        self.register_buffer("bias", torch.zeros(shape.experts))
        self.experts = nn.Parameter(
            torch.stack([_init_expert((width, hidden), generator) for _ in range(shape.experts)])
        )
        self.shared = nn.Parameter(_init_expert((width * shape.shared_experts, hidden), generator))

    def forward(self, x: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        ids, weights = select_experts(x @ self.gate.T, self.bias, self.shape)
        typed = x.to(precision)
        output, load = run_experts(typed, weights, ids, self.experts)
        return output + _swiglu(typed, self.shared) if self.shape.shared_experts else output, load

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        names = {"gate.weight": self.gate.data, "gate.expert_bias": self.bias}
        for e in range(self.shape.experts):
            names |= _projection_tensors(f"experts.{e}.", self.experts.data[e])
        return names | (
            _projection_tensors("shared_experts.", self.shared.data)
            if self.shape.shared_experts
            else {}
        )


def select_experts(logits: Tensor, bias: Tensor, shape: NetworkShape) -> tuple[Tensor, Tensor]:
    """Experts [T, k] by biased score in the best groups, and their weights without the bias."""
    probability = torch.sigmoid(logits)  # [T, E] fp32
    with torch.no_grad():
        score = (probability + bias).view(len(logits), shape.groups, -1)
        best = score.amax(-1, keepdim=True)
        second_best = score.masked_fill(score == best, -torch.inf).amax(-1)
        group_score = best.squeeze(-1) + second_best  # [T, G]
        # Counting the better groups is several times faster than sorting them.
        num_better = (group_score[:, None, :] > group_score[:, :, None]).sum(-1)
        allowed_score = score.masked_fill((num_better >= shape.topk_groups)[..., None], -torch.inf)
        ids = allowed_score.flatten(1).topk(shape.k, sorted=False).indices
    weight = probability.gather(1, ids)
    return ids, weight * (shape.routed_scale / (weight.sum(-1, keepdim=True) + 1e-20))


def sort_by_expert(ids: Tensor, experts: int, alignment: int = 1) -> ExpertOrder:
    """Sort the expert ids [T, k] of all tokens by expert."""
    flat = ids.flatten()
    sorted_pairs = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + alignment - 1) // alignment * alignment
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)  # [E] padding rows before each expert
    rows = torch.arange(len(flat), device=ids.device) + shift.repeat_interleave(counts)
    row_index = torch.empty_like(flat).scatter_(0, sorted_pairs, rows)
    pair_index = flat.new_full((int(ends[-1]),), len(flat)).scatter_(0, rows, sorted_pairs)
    return ExpertOrder(pair_index, row_index.view_as(ids), ends.to(torch.int32), counts)


def run_experts(x: Tensor, weights: Tensor, ids: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of experts [T, H], and the number of rows of each expert [E].

    ``matrices`` [E, 3, I, H]: gate, up, and down transposed. Matmuls run in the dtype of ``x``.
    """
    order = sort_by_expert(ids, len(matrices), ROW_ALIGNMENT[x.dtype])
    matrices = matrices.to(x.dtype)
    token = (order.pair_index // ids.shape[1]).clamp_max(len(x) - 1)  # [R]
    gate_up = matrices[:, :2].flatten(1, 2).mT
    gate, up = F.grouped_mm(x[token], gate_up, offs=order.expert_ends).chunk(2, -1)  # [R, I]
    # A padding row has weight 0, which also keeps it out of every gradient.
    scale = F.pad(weights.flatten(), (0, 1))[order.pair_index].to(x.dtype)[:, None]
    rows = F.grouped_mm(F.silu(gate) * up * scale, matrices[:, 2], offs=order.expert_ends)
    return rows[order.row_index].sum(1), order.counts


def _swiglu(x: Tensor, weight: Tensor) -> Tensor:
    typed_weight = weight.to(x.dtype)
    gate, up = F.linear(x, typed_weight[:2].flatten(0, 1)).chunk(2, -1)
    return (F.silu(gate) * up) @ typed_weight[2]


def _rope_tables(positions: Tensor, shape: NetworkShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, L, rotary / 2] of every position."""
    size = int(shape.head_dim * shape.rotary_fraction)
    powers = torch.arange(0, size, 2, device=positions.device).float() / size
    angle = positions[:, None, :, None].float() / shape.rope_theta**powers
    return angle.cos(), angle.sin()


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


def _uniform(size: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    bound = 0.5 * math.sqrt(3 / inputs)
    return torch.empty(size).uniform_(-bound, bound, generator=generator)


def _init_expert(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Gate, up and down transposed [3, I, H]. Down is 0, so the initial output of a layer is 0."""
    matrices = _uniform((3, *size), size[1], generator)
    matrices[2] = 0
    return matrices


def _projection_tensors(prefix: str, matrices: Tensor) -> dict[str, Tensor]:
    gate, up, down = matrices
    return {
        f"{prefix}gate_proj.weight": gate,
        f"{prefix}up_proj.weight": up,
        f"{prefix}down_proj.weight": down.T,
    }
