"""The values that layers talk in.

Shapes: B rows of a batch, S sequences that route, N tokens of each, T = S*N, E experts, k a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.quantization import QTensor


@dataclass(frozen=True)
class Window:
    """What a forward computes and how far it sees.

    Row b computes positions ``start[b] .. start[b] + width`` and attends to keys at positions
    ``0 .. visible[b]``. With ``block > 0`` the window is block-causal inside: a query at position p
    sees keys before ``(p // block + 1) * block`` only (and before ``visible``).
    """

    start: Tensor  # [B] int64
    width: int
    visible: Tensor  # [B] int64
    block: int = 0


@dataclass(frozen=True)
class QueryPositions:
    """Where the tokens of a forward stand, and how far each of them sees."""

    positions: Tensor  # [B, W] int64
    key_limits: Tensor  # [B, W] int64: keys before that position are seen
    kv_length: int  # nobody's limit is beyond
    cos: Tensor  # [B, W, 1, turning / 2] fp32: the first features of a head turn by these
    sin: Tensor


@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values by position, [rows, kv_heads, length, head_dim] each."""

    keys: Tensor
    values: Tensor
    cache_rows: Tensor  # [B] int64: the rows that a batch's are


@dataclass(frozen=True)
class LogitsSummary:
    """What w rows of logits say; -1 is no token."""

    argmax: Tensor  # [w] int64: the token with the greatest logit, the lower id of equals
    unmasked_argmax: Tensor  # [w] int64: the same, but never the mask
    logsumexp: Tensor  # [w] fp32: the log of the sum of e**logits; finite where all of them are
    probabilities: Tensor  # [w, 2] fp32: the probabilities of these two tokens

    @staticmethod
    def from_logits(
        logits: Tensor, argmax: Tensor, unmasked_argmax: Tensor, logsumexp: Tensor
    ) -> LogitsSummary:
        """With the probabilities that follow, of logits [w, V]; no numbers where these are none."""
        candidate_logits = logits.gather(
            -1, torch.stack([argmax, unmasked_argmax], dim=-1).clamp(min=0)
        )
        return LogitsSummary(
            argmax, unmasked_argmax, logsumexp, (candidate_logits - logsumexp[:, None]).exp()
        )

    def __getitem__(self, rows: slice) -> LogitsSummary:
        return LogitsSummary(
            self.argmax[rows],
            self.unmasked_argmax[rows],
            self.logsumexp[rows],
            self.probabilities[rows],
        )

    def to_host(self) -> LogitsSummary:
        """The same, in one read of five numbers a row."""
        if self.logsumexp.device.type == "cpu":
            return self
        # Whole numbers and fp32 fit into fp64 as they are.
        columns = (
            self.argmax,
            self.unmasked_argmax,
            self.logsumexp,
            *self.probabilities.unbind(-1),
        )
        host_values = torch.stack([column.double() for column in columns]).cpu()
        return LogitsSummary(
            host_values[0].long(),
            host_values[1].long(),
            host_values[2].float(),
            host_values[3:].T.float(),
        )


@dataclass(frozen=True)
class RouterSpec:
    """How a family's gate turns logits into choices and weights."""

    experts: int
    k: int
    activation: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    biased_weight: bool = False  # LLaDA-MoE with a bias: the biased probability also multiplies
    epsilon: float = 0.0  # added to the sum when renormalising (LLaDA2: 1e-20)


@dataclass(frozen=True)
class DecodeProgress:
    """How far decoding is at each position that routes, for policies that choose who votes."""

    masked: Tensor | None = None  # [S, N] bool: still masked
    after_eos: Tensor | None = None  # [S, N] bool: after the row's first end-of-text
    uncertainty: Tensor | None = None  # [S, N] >= 0: 1 - confidence when last looked at, else 1


@dataclass(frozen=True)
class PreviousCoresets:
    """The coresets of the step before: each stays as long as it holds 1 - ``drift`` of the votes
    that a fresh one holds. A row without any elects anew."""

    reuse_tolerance: float
    coresets: Tensor  # [S, E] bool


@dataclass(frozen=True)
class CoresetReuse:
    """Who may be used in the place of a fresh coreset."""

    coresets: Tensor  # [S, E] bool
    reused: Tensor  # [S] bool: whether it is that of the step before
    vote_loss: (
        Tensor  # [S] fp64: of the fresh one's votes, the share lost by that; 0 where it moved
    )


@dataclass(frozen=True)
class Scores:
    """What a gate thinks: logits [S, N, E] in fp32, and all that follows from them.

    ``voters`` is the engine's word: the live block (and look-around) of unfinished rows. A policy's
    ``voters=`` option narrows it with ``progress``. A sequence without a voter elects from all of
    its tokens: nothing reads what it computes, and nothing may fail on it.
    """

    logits: Tensor
    router: RouterSpec
    bias: Tensor | None = None  # [E], for selection
    voters: Tensor | None = None  # [S, N] weight of each token's vote, >= 0; None = everybody
    progress: DecodeProgress | None = None
    importance: Tensor | None = None  # [S, N], for policies that ask for it
    resident: Tensor | None = None  # [E] bool: experts already in fast memory
    slots: int | None = None  # of how many experts fast memory has room; None = of all
    previous_coresets: PreviousCoresets | None = None  # what a block does not leave without need
    layer: int = 0
    moe_index: int = 0  # of the layer among those that route: 0, 1, ..
    forward_indices: tuple[int, ...] = ()  # decode-forward number of each row (for seeded controls)
    vanilla_ids: Tensor | None = (
        None  # [S, N, k] the unmodified model's choice; ``route`` fills it in
    )

    @cached_property
    def probability(self) -> Tensor:
        """p = act(z), [S, N, E]."""
        if self.router.activation == "softmax":
            return torch.softmax(self.logits, dim=-1)
        # Torch's sigmoid differs in its last bit between whole vectors and the rest of a tensor.
        # In whole vectors, equal logits tie, and a row does not feel who is beside it.
        size = self.logits.shape[-1]
        padded = F.pad(self.logits, (0, -size % 64)) if size % 64 else self.logits
        return torch.sigmoid(padded)[..., :size]

    @cached_property
    def selection_scores(self) -> Tensor:
        """c = p + bias, what sorts, [S, N, E]."""
        return self.probability if self.bias is None else self.probability + self.bias

    @cached_property
    def gate_weights(self) -> Tensor:
        """What multiplies before renormalising and scaling, [S, N, E]."""
        return self.selection_scores if self.router.biased_weight else self.probability


@dataclass(frozen=True)
class CoresetRule:
    """A coreset rule in plain numbers, as kernels take it; exactly one of the three sizes is given.

    ``union``: every voter's first so many own experts; nothing is counted. ``count``: so many
    experts with most votes. ``mass``: the fewest that hold this share of all votes, ``least`` at
    least. Of every voter the first ``protect`` own experts are in before votes are counted. Where
    some experts are in fast memory, ``lam`` favours them, within ``eps`` of the votes. With
    ``most`` never more than so many: of a union, or of protected experts, those with most votes.
    """

    vote: Literal["masked", "weight", "count", "full", "margin", "max"] = "masked"
    union: int = 0
    count: int = 0
    mass: float = 0.0
    min_experts: int = 1
    protect: int = 0
    resident_bonus: float = 0.0
    max_vote_loss: float = 0.0
    max_experts: int = 0


@dataclass(frozen=True)
class Routing:
    """Who computes what. Every position counts, voting or not: all of them are computed."""

    topk_ids: Tensor  # [T, k] int64, -1 = none, best first by rank
    topk_weights: (
        Tensor  # [T, k] fp32, exactly as multiplied into expert outputs; 0 where there is none
    )
    used: Tensor  # [E] bool
    vanilla_ids: Tensor  # [T, k] int64, what the unmodified model would have chosen
    coreset_reuse: CoresetReuse | None = None  # where there were incumbents, or could have been


@dataclass(frozen=True)
class PackedExperts:
    """A weight [n, rows, k] as the kernels of a CPU read it; what a byte says is their affair.

    Gate, up and down of an expert are one run of bytes: a slab's two weights share the tensor.
    """

    packed: Tensor  # [n, bytes of an expert] uint8
    format: Literal["bf16", "int8", "int4"]
    shape: tuple[int, int, int]

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored."""
        storage_dtypes = {"bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
        return storage_dtypes[self.format]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Of the whole slab."""
        return self.packed.nbytes

    def __len__(self) -> int:
        return len(self.packed)


@dataclass(frozen=True)
class PackedMatrix:
    """A weight [rows, k] of one product, in bf16 or fp32, as the kernels of a CPU read it."""

    packed: Tensor  # [bytes] uint8
    dtype: torch.dtype
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


Matrix: TypeAlias = Tensor | PackedMatrix


@dataclass(frozen=True)
class Slab:
    """Weights ready to compute with: gate_up [n, 2*I, H] (gate rows first), down [n, H, I]."""

    gate_up: Tensor | QTensor | PackedExperts
    down: Tensor | QTensor | PackedExperts
    slot_of: Tensor  # [E] int64, -1 = absent


@dataclass(frozen=True)
class ExpertRequest:
    """One forward's call on the experts of a layer; what each is worth only where it is asked."""

    used: Tensor  # [E] bool
    routing: Routing | None = None
    scores: Scores | None = None

    @property
    def token_counts(self) -> Tensor | None:
        """[E] int64: how many tokens each expert computes; None where nobody said."""
        if self.routing is None:
            return None
        # Nobody counts behind the last expert: looking for the others would wait for a device.
        flat_ids, experts = self.routing.topk_ids.flatten(), len(self.used)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat_ids.device)
        return counts.index_add_(
            0, flat_ids.where(flat_ids >= 0, experts), torch.ones_like(flat_ids)
        )[:-1]

    @property
    def votes(self) -> Tensor | None:
        """[E] fp64: the voters' probability of own experts (DES, Eq. 6), for those too that are not
        used; None where nobody said. Of a sequence without voters, everybody's."""
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
    """Bool mask [..., experts] of the ids [..., k]; -1 is nobody."""
    mask = torch.zeros(*ids.shape[:-1], experts + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, ids.where(ids >= 0, experts), True)[..., :experts]


class Policy(Protocol):
    """Which experts may a token use."""

    def eligible(self, scores: Scores, k: int) -> Tensor:
        """Bool mask that broadcasts to [S, N, E]."""
        ...


class ExpertStore(Protocol):
    """Where experts live."""

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        """Slabs that together hold every expert of ``demand.used`` once, maybe others too.

        What a slab holds stands until the next one is asked for.
        """
        ...

    def resident(self, layer: int) -> Tensor | None:
        """Experts already in fast memory, bool [E]; None where all of them always are."""
        ...

    def slots(self, layer: int) -> int | None:
        """Of how many experts fast memory has room at once; None where it has room for all."""
        ...
