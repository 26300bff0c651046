"""Who would have been elected: policies asked again, over what a trace has kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coterie.errors import CoterieError
from coterie.lab.replay.bit_packing import Mask
from coterie.lab.replay.trace import Trace, TraceForward
from coterie.routing import Coreset, DesSeq, Election, McMoe, Naee, TopK, Vanilla, format_policy
from coterie.values import DecodeProgress, Policy, RouterSpec, Scores

Fidelity = Literal["exact", "nearly"]

UNKNOWN_LOGIT = -80.0  # logits of experts that a trace says nothing of: no probability
UNKNOWN_BIAS = -10.0  # their bias: none ranks among those that it knows
MIN_MARGIN = 1e-6  # of a margin
MAX_PROBABILITY = 1 - 2.0**-20  # a probability beyond has no finite logit in fp32


def fidelity(policy: Policy) -> Fidelity:
    """How well a trace replays it; raises CoterieError where it lacks what the policy asks for."""
    if isinstance(policy, McMoe):
        raise CoterieError("a trace keeps no importance, so mc-moe cannot be replayed")
    if isinstance(policy, Vanilla | TopK):
        return "exact"
    if isinstance(policy, Naee):
        return "nearly"
    election = election_of(policy)
    if election.voters == "uncertain":
        raise CoterieError(f"{format_policy(policy)}: a trace keeps no uncertainty of its voters")
    is_union = isinstance(policy, DesSeq) or (isinstance(policy, Coreset) and policy.k is not None)
    is_union = is_union and election.max_experts is None  # else votes say who of the union stays
    if election.vote in ("full", "max") and not is_union:
        raise CoterieError(
            f"{format_policy(policy)}: vote={election.vote} asks for scores of experts that no token "
            "would take, and a trace keeps none"
        )
    return "exact" if is_union or election.vote in ("count", "random") else "nearly"


def election_of(policy: Policy) -> Election:
    """The election behind a policy; of one without, one without options."""
    election = getattr(policy, "election", None)
    return election if isinstance(election, Election) else Election()


def prefers_residents(policy: Policy) -> bool:
    """Whether what is in fast memory changes what it elects."""
    return election_of(policy).resident_bonus > 0


def select_from_trace(
    trace: Trace,
    policy: Policy,
    forwards: Sequence[TraceForward],
    ordinal: int,
    resident: Mask | None = None,
    *,
    slots: int | None = None,
) -> Mask:
    """[F, E]: whom each of these forwards (of one width) would use in a layer; ``ordinal`` is its
    place among those that route, ``slots`` what it has of fast memory.

    A coreset counts as used whole: what tokens take in it beside their own is not in a trace.
    """
    vanilla_mask = np.stack([forward.vanilla_mask[ordinal] for forward in forwards])
    joint = election_of(policy).scope == "batch"
    scores = trace_scores(trace, forwards, ordinal, resident, slots=slots, joint=joint)
    mask = policy.eligible(scores, trace.header.k)
    if mask.numel() == 1:
        return vanilla_mask
    if mask.shape[1] == 1:
        return np.broadcast_to(mask[:, 0].numpy(), vanilla_mask.shape)
    allowed = mask.gather(-1, trace_vanilla_ids(scores))  # [F, N, k]
    ids = torch.where(allowed, trace_vanilla_ids(scores), trace.header.experts).flatten(1)
    used = torch.zeros(len(ids), trace.header.experts + 1, dtype=torch.bool)
    return used.scatter_(1, ids, True)[:, :-1].numpy()


def trace_scores(
    trace: Trace,
    forwards: Sequence[TraceForward],
    ordinal: int,
    resident: Mask | None = None,
    *,
    slots: int | None = None,
    joint: bool = False,
) -> Scores:
    """What a gate thought, as far as it was kept: own experts, their scores, the next one's score.

    The next expert's name was not kept: the first one that is no token's own stands for it.
    ``joint``: all rows as one sequence.
    """
    header = trace.header
    ids = _stack([forward.vanilla_ids[ordinal] for forward in forwards]).long()
    next_score = _stack([forward.next_score[ordinal] for forward in forwards]).unsqueeze(-1)
    rank = _stack([forward.rank[ordinal] for forward in forwards]).maximum(next_score + MIN_MARGIN)
    flags = [
        _stack([getattr(forward, name) for forward in forwards])
        for name in ("voters", "masked", "filled")
    ]
    if joint:
        ids, rank, next_score, *flags = (
            x.flatten(0, 1).unsqueeze(0) for x in (ids, rank, next_score, *flags)
        )
    voters, masked, filled = flags
    bias = torch.zeros(header.experts) if trace.bias is None else torch.tensor(trace.bias[ordinal])
    p = (rank - bias[ids]).clamp(1e-9, MAX_PROBABILITY)
    shape = (*ids.shape[:2], header.experts)
    next_expert = torch.zeros(shape).scatter_(-1, ids, 1.0).argmin(-1, keepdim=True)
    bias_by_token = (
        torch.full(shape, UNKNOWN_BIAS)
        .scatter_(-1, next_expert, next_score)
        .scatter_(-1, ids, rank - p)
    )
    return Scores(
        logits=torch.full(shape, UNKNOWN_LOGIT).scatter_(-1, ids, torch.logit(p)),
        router=RouterSpec(
            header.experts,
            header.k,
            "sigmoid",
            renormalise=True,
            biased_weight=header.biased_weight,
        ),
        bias=bias_by_token,  # [F, N, E], where a model's is [E]
        voters=voters.float(),
        progress=DecodeProgress(masked=masked, after_eos=filled),
        resident=None if resident is None else torch.from_numpy(resident),
        slots=slots,
        layer=header.layers[ordinal],
        moe_index=ordinal,
        forward_indices=tuple(forward.decode_index for forward in forwards),
        vanilla_ids=ids,
    )


def trace_vanilla_ids(scores: Scores) -> Tensor:
    """[F, N, k]: the own ids that ``scores_of`` has put in."""
    if scores.vanilla_ids is None:
        raise RuntimeError("these scores are of no trace")
    return scores.vanilla_ids


def forward_votes(trace: Trace, forward: TraceForward) -> np.ndarray:
    """[L, E] float64: the router's probability of own experts, summed over voters (DES-Vote's);
    nothing where scores were not kept."""
    votes = np.zeros(forward.used.shape)
    if not forward.tokens:
        return votes
    bias = np.zeros_like(votes) if trace.bias is None else trace.bias
    can_vote = forward.voters if forward.voters.any() else np.ones_like(forward.voters)
    for layer, ids in enumerate(forward.vanilla_ids):
        p = (forward.rank[layer] - bias[layer][ids]).clip(0, 1)
        np.add.at(votes[layer], ids[can_vote].reshape(-1), p[can_vote].reshape(-1))
    return votes


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
