"""Who would have been elected: policies asked again, over what a trace has kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coterie.naming import CoterieError
from coterie.planning.coding import Mask
from coterie.planning.trace import Forward, Trace
from coterie.routing import Coreset, DesSeq, Election, McMoe, Naee, TopK, Vanilla, spell
from coterie.values import Policy, Progress, RouterSpec, Scores

Fidelity = Literal["exact", "nearly"]

SILENT = -80.0  # logits of experts that a trace says nothing of: no probability
BELOW = -10.0  # their bias: none ranks among those that it knows
LEAST = 1e-6  # of a margin
SURE = 1 - 2.0**-20  # a probability beyond has no finite logit in fp32


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
        raise CoterieError(f"{spell(policy)}: a trace keeps no uncertainty of its voters")
    united = isinstance(policy, DesSeq) or (isinstance(policy, Coreset) and policy.k is not None)
    united = united and election.most is None  # else votes say who of the union stays
    if election.vote in ("full", "max") and not united:
        raise CoterieError(
            f"{spell(policy)}: vote={election.vote} asks for scores of experts that no token "
            "would take, and a trace keeps none"
        )
    return "exact" if united or election.vote in ("count", "random") else "nearly"


def election_of(policy: Policy) -> Election:
    """The election behind a policy; of one without, one without options."""
    found = getattr(policy, "election", None)
    return found if isinstance(found, Election) else Election()


def prefers_residents(policy: Policy) -> bool:
    """Whether what is in fast memory changes what it elects."""
    return election_of(policy).lam > 0


def elected(
    trace: Trace,
    policy: Policy,
    forwards: Sequence[Forward],
    ordinal: int,
    resident: Mask | None = None,
    *,
    slots: int | None = None,
) -> Mask:
    """[F, E]: whom each of these forwards (of one width) would use in a layer; ``ordinal`` is its
    place among those that route, ``slots`` what it has of fast memory.

    A coreset counts as used whole: what tokens take in it beside their own is not in a trace.
    """
    own = np.stack([forward.own[ordinal] for forward in forwards])
    joint = election_of(policy).scope == "batch"
    scores = scores_of(trace, forwards, ordinal, resident, slots=slots, joint=joint)
    mask = policy.eligible(scores, trace.about.k)
    if mask.numel() == 1:
        return own
    if mask.shape[1] == 1:
        return np.broadcast_to(mask[:, 0].numpy(), own.shape)
    allowed = mask.gather(-1, taken(scores))  # [F, N, k]
    ids = torch.where(allowed, taken(scores), trace.about.experts).flatten(1)
    used = torch.zeros(len(ids), trace.about.experts + 1, dtype=torch.bool)
    return used.scatter_(1, ids, True)[:, :-1].numpy()


def scores_of(
    trace: Trace,
    forwards: Sequence[Forward],
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
    about = trace.about
    ids = _stacked([forward.ids[ordinal] for forward in forwards]).long()
    following = _stacked([forward.following[ordinal] for forward in forwards]).unsqueeze(-1)
    rank = _stacked([forward.rank[ordinal] for forward in forwards]).maximum(following + LEAST)
    marks = [
        _stacked([getattr(forward, name) for forward in forwards])
        for name in ("voters", "masked", "filled")
    ]
    if joint:
        ids, rank, following, *marks = (
            x.flatten(0, 1).unsqueeze(0) for x in (ids, rank, following, *marks)
        )
    voters, masked, filled = marks
    bias = torch.zeros(about.experts) if trace.bias is None else torch.tensor(trace.bias[ordinal])
    p = (rank - bias[ids]).clamp(1e-9, SURE)
    shape = (*ids.shape[:2], about.experts)
    next_one = torch.zeros(shape).scatter_(-1, ids, 1.0).argmin(-1, keepdim=True)
    shift = torch.full(shape, BELOW).scatter_(-1, next_one, following).scatter_(-1, ids, rank - p)
    return Scores(
        logits=torch.full(shape, SILENT).scatter_(-1, ids, torch.logit(p)),
        router=RouterSpec(
            about.experts, about.k, "sigmoid", renormalise=True, biased_weight=about.biased_weight
        ),
        bias=shift,  # [F, N, E], where a model's is [E]
        voters=voters.float(),
        progress=Progress(masked=masked, filled=filled),
        resident=None if resident is None else torch.from_numpy(resident),
        slots=slots,
        layer=about.layers[ordinal],
        ordinal=ordinal,
        forward=tuple(forward.forward for forward in forwards),
        own=ids,
    )


def taken(scores: Scores) -> Tensor:
    """[F, N, k]: the own ids that ``scores_of`` has put in."""
    if scores.own is None:
        raise RuntimeError("these scores are of no trace")
    return scores.own


def votes_of(trace: Trace, forward: Forward) -> np.ndarray:
    """[L, E] float64: the router's probability of own experts, summed over voters (DES-Vote's);
    nothing where scores were not kept."""
    votes = np.zeros(forward.used.shape)
    if not forward.tokens:
        return votes
    bias = np.zeros_like(votes) if trace.bias is None else trace.bias
    voices = forward.voters if forward.voters.any() else np.ones_like(forward.voters)
    for layer, ids in enumerate(forward.ids):
        p = (forward.rank[layer] - bias[layer][ids]).clip(0, 1)
        np.add.at(votes[layer], ids[voices].reshape(-1), p[voices].reshape(-1))
    return votes


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
