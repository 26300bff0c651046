"""Policies evaluated again on the scores that a trace holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coterie.errors import ConfigError
from coterie.lab.replay.trace import Mask, Trace, TraceForward
from coterie.routing import Coreset, DesSeq, Election, McMoe, Naee, TopK, Vanilla, format_policy
from coterie.values import DecodeProgress, Policy, RouterSpec, Scores

Fidelity = Literal["exact", "nearly"]

UNKNOWN_LOGIT = -80.0  # of experts without a score: their probability is 0
UNKNOWN_BIAS = -10.0  # of experts without a score: they rank below all others
MIN_MARGIN = 1e-6
MAX_PROBABILITY = 1 - 2.0**-20  # a larger one has no finite logit in fp32


def fidelity(policy: Policy) -> Fidelity:
    """How well a trace replays a policy; raises ConfigError where it lacks needed scores.

    Exact: vanilla, topk, des-seq, random and coresets with vote=count. Nearly: naee and coresets
    with vote=topk-prob, weight or margin. An error: scores of experts outside the top-k (xshare,
    racing, vote=full, vote=max), uncertainty (voters=uncertain) and importance (mc-moe).
    """
    if isinstance(policy, McMoe):
        raise ConfigError("a trace keeps no importance, so mc-moe cannot be replayed")
    if isinstance(policy, Vanilla | TopK):
        return "exact"
    if isinstance(policy, Naee):
        return "nearly"
    election = election_of(policy)
    if election.voters == "uncertain":
        raise ConfigError(f"{format_policy(policy)}: a trace keeps no uncertainty of its voters")
    is_union = isinstance(policy, DesSeq) or (isinstance(policy, Coreset) and policy.k is not None)
    is_union = (
        is_union and election.max_experts is None
    )  # a limited union drops experts by their votes
    if election.vote in ("full", "max") and not is_union:
        raise ConfigError(
            f"{format_policy(policy)}: vote={election.vote} needs scores of experts outside the "
            "top-k, and a trace keeps none"
        )
    return "exact" if is_union or election.vote in ("count", "random") else "nearly"


def election_of(policy: Policy) -> Election:
    """The election of a coreset policy; default options for other policies."""
    election = getattr(policy, "election", None)
    return election if isinstance(election, Election) else Election()


def select_from_trace(
    trace: Trace,
    policy: Policy,
    forwards: Sequence[TraceForward],
    ordinal: int,
    resident: Mask | None = None,
    *,
    slots: int | None = None,
) -> Mask:
    """[F, E]: the experts that each forward uses in one layer; forwards have one width.

    ``ordinal`` counts layers with a router, ``resident`` [E] are the cached experts. A coreset
    counts as used whole, since a trace does not show all experts that a token takes from it.
    """
    vanilla_mask = np.stack([forward.vanilla_mask[ordinal] for forward in forwards])
    joint = election_of(policy).scope == "batch"
    scores = trace_scores(trace, forwards, ordinal, resident, slots=slots, joint=joint)
    mask, ids = policy.eligible(scores, trace.header.k), scores.vanilla_ids
    assert ids is not None
    if mask.numel() == 1:
        return vanilla_mask
    if mask.shape[1] == 1:
        return np.broadcast_to(mask[:, 0].numpy(), vanilla_mask.shape)
    allowed = torch.where(mask.gather(-1, ids), ids, trace.header.experts).flatten(1)  # [F, N k]
    used = torch.zeros(len(ids), trace.header.experts + 1, dtype=torch.bool)
    return used.scatter_(1, allowed, True)[:, :-1].numpy()


def trace_scores(
    trace: Trace,
    forwards: Sequence[TraceForward],
    ordinal: int,
    resident: Mask | None = None,
    *,
    slots: int | None = None,
    joint: bool = False,
) -> Scores:
    """A layer's router scores as far as a trace holds them; ``joint`` merges rows into a sequence.

    The trace has the score of the expert ranked k + 1 but not its index. The first expert outside
    the token's top-k takes that score.
    """
    header = trace.header
    ids = _stack([forward.vanilla_ids[ordinal] for forward in forwards]).long()
    next_score = _stack([forward.next_score[ordinal] for forward in forwards]).unsqueeze(-1)
    rank = _stack([forward.rank[ordinal] for forward in forwards]).maximum(next_score + MIN_MARGIN)
    names = ("voters", "masked", "filled")
    flags = [_stack([getattr(forward, name) for forward in forwards]) for name in names]
    admitted = _stack([_admitted_experts(forward, ordinal) for forward in forwards])
    if joint:
        tensors = (ids, rank, next_score, admitted, *flags)
        ids, rank, next_score, admitted, *flags = (x.flatten(0, 1).unsqueeze(0) for x in tensors)
    voters, masked, filled = flags
    bias = torch.zeros(header.experts) if trace.bias is None else torch.tensor(trace.bias[ordinal])
    p = (rank - bias[ids]).clamp(1e-9, MAX_PROBABILITY)
    shape = (*ids.shape[:2], header.experts)
    next_id = torch.zeros(shape).scatter_(-1, ids, 1.0).argmin(-1, keepdim=True)
    token_bias = torch.full(shape, UNKNOWN_BIAS).scatter_(-1, next_id, next_score)
    router = RouterSpec(
        header.experts, header.k, "sigmoid", True, biased_weight=header.biased_weight
    )
    return Scores(
        logits=torch.full(shape, UNKNOWN_LOGIT).scatter_(-1, ids, torch.logit(p)),
        router=router,
        bias=token_bias.scatter_(-1, ids, rank - p),  # [F, N, E]; a model's is [E]
        voters=voters.float(),
        progress=DecodeProgress(masked=masked, after_eos=filled),
        resident=None if resident is None else torch.from_numpy(resident),
        slots=slots,
        layer=header.layers[ordinal],
        moe_index=ordinal,
        forward_indices=tuple(forward.decode_index for forward in forwards),
        vanilla_ids=ids,
        admitted=None if forwards[0].router_blocks is None else admitted,
    )


def _admitted_experts(forward: TraceForward, ordinal: int) -> Mask:
    """[N, E]: the experts that each token's router block admits, all of them without blocks."""
    if forward.router_blocks is None:
        return np.ones((forward.tokens, forward.used.shape[-1]), dtype=bool)
    return forward.router_blocks.admitted_by_token(forward.tokens, ordinal)


def forward_votes(trace: Trace, forward: TraceForward) -> np.ndarray:
    """[L, E] float64: DES-Vote's votes, router probabilities of the top-k summed over voters.

    Zero where no scores are stored.
    """
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
