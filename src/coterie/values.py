"""Tensor structs that layers pass to each other.

Shapes: B rows of a batch, S sequences that route, N tokens of each, T = S*N, E experts, k experts a
token. Invariants, which every producer guarantees and every consumer relies on:

- Window: all rows share one width; start + width and visible are at most the length of the cache.
- QueryPositions: key_limits <= kv_length; limits are exclusive.
- LayerKV: keys and values have one shape; cache_rows are unique.
- LogitsSummary: an id of -1 means that no logit is a number; unmasked_argmax is never the mask id.
- RouterSpec: groups divides experts, topk_groups <= groups, k <= experts. With a capacity,
  k <= capacity <= experts, and there is one group.
- DecodeProgress: a field that is None is unknown; a policy that needs it raises.
- PreviousCoresets: an all-False row has no previous coreset.
- CoresetReuse: vote_loss is in 0 .. 1, and 0 where reused is False.
- Scores: logits are fp32; voters >= 0; a row without a positive voter elects with all its tokens.
- CoresetRule: exactly one of union, count and mass is greater than 0.
- Routing: ids of a token are unique, best first; -1 means none, at the end, with weight 0.
- PackedExperts, PackedMatrix: the byte layout is opaque to Python.
- Slab: slot_of is a slot of the two weights, or -1 for an absent expert; slots are unique.
- ExpertRequest: used covers every id of routing, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.checks import describe
from coterie.errors import ConfigError
from coterie.quantization import FORMATS, QTensor, QuantFormat

VoteKind: TypeAlias = Literal["topk-prob", "weight", "count", "full", "margin", "max"]
VOTE_KINDS: tuple[VoteKind, ...] = get_args(VoteKind)  # in the order of their ids in the kernels
PackedFormat: TypeAlias = Literal["fp32", "bf16", "int8", "int4"]
PACKED_FORMATS: tuple[PackedFormat, ...] = get_args(PackedFormat)
FORMAT_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)  # that store them
STORAGE_DTYPES = dict(zip(PACKED_FORMATS, FORMAT_DTYPES, strict=True))

MAX_EXPERTS = 2**16 - 1
"""The index of an expert is the low 16 bits of a sort key."""

MAX_COUNT = 2**31 - 1


Activation: TypeAlias = Literal["silu", "gelu-tanh"]
"""The activation of a gate."""


NO_MASK = -1
"""The mask id of a model without a mask token: no token has it."""


@dataclass(frozen=True)
class Window:
    """The positions that a forward computes, and the keys that they attend to.

    Row b computes positions ``start[b] .. start[b] + width`` and attends to keys at positions
    ``0 .. visible[b]``. With ``block`` > 0 the window is block-causal inside: a query at position p
    attends only to keys before ``(p // block + 1) * block``. ``positions`` are those of a window
    with gaps.
    """

    start: Tensor  # [B] int64
    width: int
    visible: Tensor  # [B] int64
    block: int = 0
    positions: Tensor | None = None  # [B, width] int64, in order


@dataclass(frozen=True)
class QueryPositions:
    """The position of each token of a forward, and the keys that it attends to."""

    positions: Tensor  # [B, W] int64
    key_limits: Tensor  # [B, W] int64: a query attends to keys before this position
    kv_length: int  # an upper bound of key_limits
    cos: Tensor  # [B, W, 1, rotary / 2] fp32: for the first features of a head
    sin: Tensor


@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values by position, [rows, kv_heads, length, head_dim] each."""

    keys: Tensor
    values: Tensor
    cache_rows: Tensor  # [B] int64: the cache row of each row of the batch


@dataclass(frozen=True)
class LogitsSummary:
    """Greedy choice and normalisation of w rows of logits."""

    argmax: Tensor  # [w] int64: the token with the greatest logit; of ties, the lower id
    unmasked_argmax: Tensor  # [w] int64: the same without the mask token
    logsumexp: Tensor  # [w] fp32; NaN or infinite if a logit of the row is NaN or +inf
    probabilities: Tensor  # [w, 2] fp32: the probabilities of these two tokens

    @staticmethod
    def from_logits(
        logits: Tensor, argmax: Tensor, unmasked_argmax: Tensor, logsumexp: Tensor
    ) -> LogitsSummary:
        """Adds the probabilities, from logits [w, V]; NaN for a row that is not finite."""
        ids = torch.stack([argmax, unmasked_argmax], dim=-1).clamp(min=0)
        probabilities = (logits.gather(-1, ids) - logsumexp[:, None]).exp()
        return LogitsSummary(argmax, unmasked_argmax, logsumexp, probabilities)

    def __getitem__(self, rows: slice | Tensor) -> LogitsSummary:
        return LogitsSummary(
            self.argmax[rows],
            self.unmasked_argmax[rows],
            self.logsumexp[rows],
            self.probabilities[rows],
        )

    def to_host(self) -> LogitsSummary:
        """The same on the CPU, copied in one transfer of five numbers a row."""
        if self.logsumexp.device.type == "cpu":
            return self
        # Token ids and fp32 are exact in fp64.
        columns = (
            self.argmax,
            self.unmasked_argmax,
            self.logsumexp,
            *self.probabilities.unbind(-1),
        )
        host = torch.stack([column.double() for column in columns]).cpu()
        return LogitsSummary(host[0].long(), host[1].long(), host[2].float(), host[3:].T.float())


@dataclass(frozen=True)
class RouterSpec:
    """How a family's router turns logits into top-k ids and weights."""

    experts: int
    k: int
    activation: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    biased_weight: bool = False  # the biased probability is also the weight (LLaDA-MoE with a bias)
    epsilon: float = 0.0  # added to the sum when renormalising (LLaDA2: 1e-20)
    capacity: int = 0  # experts that a block admits (LLaDA2.2); 0 = all
    block: int = 32  # positions of a block that admits experts, from multiples of it on

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.experts <= MAX_EXPERTS:
            raise ConfigError(f"{self.k} of {self.experts} experts; at most {MAX_EXPERTS} can be")
        if self.groups < 1 or self.experts % self.groups:
            raise ConfigError(f"{self.experts} experts are not {self.groups} groups of one size")
        if not 1 <= self.topk_groups <= self.groups:
            raise ConfigError(f"{self.topk_groups} of {self.groups} groups of experts")
        if self.activation not in ("softmax", "sigmoid"):
            raise ConfigError(f"router activation {self.activation!r}; known: softmax, sigmoid")
        if not 1 <= self.block <= MAX_COUNT:
            raise ConfigError(f"blocks of {self.block} positions admit experts")
        if self.capacity and not self.k <= self.capacity <= self.experts:
            raise ConfigError(
                f"blocks admit {self.capacity} of {self.experts} experts, and a token uses {self.k}"
            )
        if self.capacity and self.topk_groups < self.groups:
            raise ConfigError("blocks admit experts, and tokens drop groups: both limit a router")


@dataclass(frozen=True)
class DecodeProgress:
    """How far decoding is at each position that routes, for policies that choose voters by it."""

    masked: Tensor | None = None  # [S, N] bool: still masked
    after_eos: Tensor | None = None  # [S, N] bool: after the row's first end-of-text
    uncertainty: Tensor | None = None  # [S, N] >= 0: 1 - the last confidence; 1 if there is none


@dataclass(frozen=True)
class PreviousCoresets:
    """The coresets of a block's previous step.

    A coreset is reused as long as it holds 1 - ``reuse_tolerance`` of the votes that a fresh one
    holds. A row without one elects.
    """

    reuse_tolerance: float
    coresets: Tensor  # [S, E] bool


@dataclass(frozen=True)
class CoresetReuse:
    """The coresets after reuse: the previous one where it is still good, else the fresh one."""

    coresets: Tensor  # [S, E] bool
    reused: Tensor  # [S] bool: whether it is the previous one
    vote_loss: Tensor  # [S] fp64: the share of the fresh coreset's votes that reuse loses


@dataclass(frozen=True)
class Scores:
    """The router's logits [S, N, E] in fp32, and what policies need besides.

    The engine sets ``voters``: in unfinished rows the positions of the current block, and those
    around it that ``dual`` computes too. A policy's ``voters=`` option narrows them by
    ``progress``. A row without a voter elects with all of its tokens: its results are never read,
    and it must not fail.
    """

    logits: Tensor
    router: RouterSpec
    bias: Tensor | None = None  # [E], added for selection
    expert_scale: Tensor | None = None  # [E] fp32, multiplied into the weights of each token
    voters: Tensor | None = None  # [S, N] vote weights >= 0; None: 1 for every token
    progress: DecodeProgress | None = None
    importance: Tensor | None = None  # [S, N], if the policy needs it
    resident: Tensor | None = None  # [E] bool: experts in fast memory; None: all of them
    slots: int | None = None  # how many experts of the layer fit into fast memory; None: all
    previous_coresets: PreviousCoresets | None = None  # None: coresets are not reused
    layer: int = 0
    moe_index: int = 0  # the index of the layer among those that route
    forward_indices: tuple[int, ...] = ()  # the decode-forward number of each row, for seeds
    vanilla_ids: Tensor | None = None  # [S, N, k] unmodified top-k ids; filled in by ``route``
    starts: Tensor | None = None  # [S] int64: the position of each row's first token; None = 0
    admitted: Tensor | None = None  # [S, N, E] bool, see ``admitted_experts``; by ``route``

    @cached_property
    def probability(self) -> Tensor:
        """p = act(z), [S, N, E]."""
        if self.router.activation == "softmax":
            return torch.softmax(self.logits, dim=-1)
        # Torch's sigmoid differs in its last bit between whole vectors and the rest of a tensor.
        # In whole vectors equal logits tie, and a row does not depend on the rest of the batch.
        size = self.logits.shape[-1]
        padded = F.pad(self.logits, (0, -size % 64)) if size % 64 else self.logits
        return torch.sigmoid(padded)[..., :size]

    @cached_property
    def selection_scores(self) -> Tensor:
        """c = p + bias, which ranks experts, [S, N, E]."""
        return self.probability if self.bias is None else self.probability + self.bias

    @cached_property
    def gate_weights(self) -> Tensor:
        """Expert weights before renormalising and scaling, [S, N, E]."""
        return self.selection_scores if self.router.biased_weight else self.probability

    def positions(self, first: int, stop: int | None = None) -> Scores:
        """The scores of some positions of each row, before ``route`` has filled in anything."""
        span = slice(first, stop)
        cut = {name: value[:, span] for name, value in self._by_position().items()}
        progress = self.progress and DecodeProgress(
            *(None if part is None else part[:, span] for part in vars(self.progress).values())
        )
        starts = None if self.starts is None else self.starts + first
        return replace(self, **cut, progress=progress, starts=starts)

    def _by_position(self) -> dict[str, Tensor]:
        parts = {"logits": self.logits, "voters": self.voters, "importance": self.importance}
        return {name: value for name, value in parts.items() if value is not None}


@dataclass(frozen=True)
class CoresetRule:
    """A coreset policy in plain numbers, for kernels. One of three fields gives the size.

    ``union``: the first so many of each voter's own experts, without a vote. ``count``: so many
    experts with most votes. ``mass``: the fewest experts that hold this share of all votes, at
    least ``min_experts``.

    The first ``protect`` own experts of each voter are in the coreset before votes count.
    ``resident_bonus`` favours experts in fast memory, and loses at most ``max_vote_loss`` of the
    votes. ``max_experts`` > 0 limits the coreset; a union or protected experts beyond it are cut
    to those with most votes.
    """

    vote: VoteKind = "topk-prob"
    union: int = 0
    count: int = 0
    mass: float = 0.0
    min_experts: int = 1
    protect: int = 0
    resident_bonus: float = 0.0
    max_vote_loss: float = 0.0
    max_experts: int = 0

    def __post_init__(self) -> None:
        if self.vote not in VOTE_KINDS:
            raise ConfigError(f"vote {self.vote!r}; known: {', '.join(VOTE_KINDS)}")
        counts = (self.union, self.count, self.min_experts, self.protect, self.max_experts)
        shares = (self.mass, self.resident_bonus, self.max_vote_loss)
        if min(*counts, *shares) < 0 or max(counts) > MAX_COUNT or any(map(math.isnan, shares)):
            raise ConfigError(f"a number of {self} is negative, too large or NaN")
        if (self.union > 0) + (self.count > 0) + (self.mass > 0) != 1:
            raise ConfigError(f"one of union, count and mass gives the size of a coreset: {self}")


@dataclass(frozen=True)
class Routing:
    """The experts and weights of every computed token, whether it votes or not."""

    topk_ids: Tensor  # [T, k] int64, -1 = none, best first
    topk_weights: Tensor  # [T, k] fp32, as multiplied into expert outputs; 0 for no expert
    used: Tensor  # [E] bool
    vanilla_ids: Tensor  # [T, k] int64, the unmodified model's top-k ids
    coreset_reuse: CoresetReuse | None = None  # None: coresets are not reused


def join_routings(rows: int, first: Routing, second: Routing) -> Routing:
    """One routing of ``rows`` rows, in which the tokens of ``first`` precede those of ``second``.

    The reuse of coresets is that of ``second``.
    """

    def joined(a: Tensor, b: Tensor) -> Tensor:
        parts = [part.view(rows, -1, part.shape[-1]) for part in (a, b)]
        return torch.cat(parts, dim=1).flatten(0, 1)

    return Routing(
        joined(first.topk_ids, second.topk_ids),
        joined(first.topk_weights, second.topk_weights),
        first.used | second.used,
        joined(first.vanilla_ids, second.vanilla_ids),
        second.coreset_reuse,
    )


@dataclass(frozen=True)
class PackedExperts:
    """Expert weights [n, rows, k] in the packed layout of the CPU kernels, opaque to Python.

    Gate, up and down of an expert are contiguous: the two weights of a slab share the tensor.
    """

    packed: Tensor  # [n, bytes of an expert] uint8
    format: PackedFormat
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.format not in PACKED_FORMATS:
            raise ConfigError(f"format {self.format!r}; known: {', '.join(PACKED_FORMATS)}")
        packed, experts = self.packed, self.shape[0]
        is_rows = packed.dtype is torch.uint8 and packed.dim() == 2 and len(packed) == experts
        if not is_rows or (packed.shape[1] > 1 and packed.stride(1) != 1) or min(self.shape) < 0:
            raise ValueError(f"{experts} packed experts {self.shape}: {describe(packed)}, not rows")

    @property
    def dtype(self) -> torch.dtype:
        """The storage type."""
        return STORAGE_DTYPES[self.format]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """The size of gate, up and down of all n experts."""
        return self.packed.nbytes

    def __len__(self) -> int:
        return len(self.packed)


@dataclass(frozen=True)
class PackedMatrix:
    """A weight [rows, k] in bf16, fp32 or int8, in the packed layout of the CPU kernels."""

    packed: Tensor  # [bytes] uint8
    dtype: torch.dtype
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float32, torch.int8) or min(self.shape) < 0:
            raise ValueError(
                f"a packed matrix {self.shape} in {self.dtype}; use bf16, fp32 or int8"
            )
        (rows, k), packed = self.shape, self.packed
        # Panel pairs of 32 rows: four bytes of each row in a step, or groups and their scales.
        row_bytes = 4 * (k if self.dtype is torch.float32 else -(-k // 2))
        if self.dtype is torch.int8:
            group = FORMATS["int8"].group
            row_bytes = -(-k // group) * (group + 2)
        size = -(-rows // 32) * 32 * row_bytes
        if packed.dtype is not torch.uint8 or packed.shape != (size,) or not packed.is_contiguous():
            raise ValueError(f"a packed matrix {self.shape}: {describe(packed)}, not {size} bytes")

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


Matrix: TypeAlias = Tensor | QTensor | PackedMatrix


@dataclass(frozen=True)
class Slab:
    """Loaded expert weights: gate_up [n, 2*I, H] (gate rows first) and down [n, H, I]."""

    gate_up: Tensor | QTensor | PackedExperts
    down: Tensor | QTensor | PackedExperts
    slot_of: Tensor  # [E] int64, -1 = absent

    @staticmethod
    def of(tensors: Mapping[str, Tensor], form: QuantFormat | None, slot_of: Tensor) -> Slab:
        """From ``gate_up`` and ``down``, or ``.q`` and ``.scales`` of both if quantized."""
        if form is None:
            return Slab(tensors["gate_up"], tensors["down"], slot_of)
        (_, hidden, _), gate_up_rows = tensors["down.q"].shape, tensors["gate_up.q"].shape[1]
        gate_up, down = (
            QTensor(tensors[f"{name}.q"], tensors[f"{name}.scales"], form, k)
            for name, k in (("gate_up", hidden), ("down", gate_up_rows // 2))
        )
        return Slab(gate_up, down, slot_of)

    def __post_init__(self) -> None:
        if self.slot_of.dtype is not torch.int64 or self.slot_of.dim() != 1:
            raise ValueError(f"slots of experts: {describe(self.slot_of)}, not [E] int64")


@dataclass(frozen=True)
class ExpertRequest:
    """One forward's request for the experts of a layer.

    Stores read token counts and votes from ``routing`` and ``scores``; both may be missing.
    """

    used: Tensor  # [E] bool
    routing: Routing | None = None
    scores: Scores | None = None

    @property
    def token_counts(self) -> Tensor | None:
        """[E] int64: how many tokens each expert computes; None without a routing."""
        if self.routing is None:
            return None
        # An id of -1 counts in an extra column: selecting valid ids would wait for the device.
        ids, experts = self.routing.topk_ids.flatten(), len(self.used)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
        counts.index_add_(0, ids.where(ids >= 0, experts), torch.ones_like(ids))
        return counts[:-1]

    @property
    def votes(self) -> Tensor | None:
        """[E] fp64: the sum over voters of the probability of their own experts (DES, Eq. 6).

        Experts outside ``used`` have votes too. All tokens of a row without voters vote. None
        without routing or scores.
        """
        if self.routing is None or self.scores is None:
            return None
        scores = self.scores
        vanilla_ids = self.routing.vanilla_ids.view(*scores.logits.shape[:2], -1)
        votes = scores.probability.gather(-1, vanilla_ids).double()
        if scores.voters is not None:
            without_voters = (scores.voters <= 0).all(-1, keepdim=True)
            votes = votes * scores.voters.masked_fill(without_voters, 1.0).unsqueeze(-1)
        totals = torch.zeros(len(self.used), dtype=torch.float64, device=votes.device)
        return totals.index_add_(0, vanilla_ids.flatten(), votes.flatten())


def expert_mask(ids: Tensor, experts: int) -> Tensor:
    """Bool mask [..., experts] of the ids [..., k]; -1 is no expert."""
    mask = torch.zeros(*ids.shape[:-1], experts + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, ids.where(ids >= 0, experts), True)[..., :experts]


class Policy(Protocol):
    """An expert-routing policy: which experts each token may use."""

    def eligible(self, scores: Scores, k: int) -> Tensor:
        """Bool mask that broadcasts to [S, N, E]."""
        ...


class ExpertStore(Protocol):
    """The storage of expert weights."""

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        """Slabs that together hold every expert of ``request.used`` once, and perhaps more.

        A slab stays valid until the next one is requested.
        """
        ...

    def resident(self, layer: int) -> Tensor | None:
        """Experts in fast memory, bool [E]; None if all of them always are."""
        ...

    @property
    def capacity(self) -> int | None:
        """Slots per layer, of all precisions; None if every expert is always in fast memory."""
        ...
