"""Routing by one call. The activation is torch's own, so that every bit that votes is."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from coterie.ops.cpu.library import VOTES, Election, library
from coterie.values import Incumbents, Routing, Rule, Scores, Settled

DONE = 0
SPLIT = ("weight", "margin")
"""Votes that each token splits: torch adds up the parts, whose order decides the last bit."""
VANILLA = Rule()


def route(scores: Scores, rule: Rule | None, voice: Tensor | None) -> Routing | None:
    """See ``ops.route``."""
    found, incumbents = library(), scores.incumbents
    if found is None or not _fits(scores, voice) or (rule is None and incumbents is not None):
        return None
    (rows, tokens, experts), router = scores.logits.shape, scores.router
    own = torch.empty(rows * tokens, router.k, dtype=torch.int64)
    ids = own if rule is None else torch.empty_like(own)
    weights, used = torch.empty(own.shape), torch.empty(experts, dtype=torch.bool)
    p, asked = scores.probability, rule or VANILLA
    settled = None if incumbents is None else _room(incumbents)
    say = None if incumbents is None else _spoken(scores.voters)
    call = Election(
        logits=scores.logits.data_ptr(),
        p=p.data_ptr(),
        bias=_address(scores.bias),
        voice=_address(voice),
        resident=_address(scores.resident),
        ids=ids.data_ptr(),
        own=own.data_ptr(),
        weights=weights.data_ptr(),
        used=used.data_ptr(),
        before=None if incumbents is None else incumbents.coresets.data_ptr(),
        say=_address(say),
        coresets=None if settled is None else settled.coresets.data_ptr(),
        stayed=None if settled is None else settled.kept.data_ptr(),
        lost=None if settled is None else settled.lost.data_ptr(),
        mass=asked.mass,
        lam=asked.lam,
        eps=asked.eps,
        drift=0.0 if incumbents is None else incumbents.drift,
        scale=router.scale,
        epsilon=router.epsilon,
        stride=p.stride(1) if tokens > 1 else p.stride(0),
        sequences=rows,
        tokens=tokens,
        experts=experts,
        k=router.k,
        groups=router.groups,
        kept=min(router.kept_groups, router.groups),
        renormalise=router.renormalise,
        biased=router.biased_weight,
        vote=VOTES.index(asked.vote),
        first=asked.union,
        count=asked.count,
        least=asked.least,
        protect=asked.protect,
        most=asked.most,
    )
    run, isa = found.handle.coterie_route, found.isa()
    if rule is not None and (rule.most or not rule.union) and rule.vote in SPLIT:
        ballots = torch.empty(scores.logits.shape)
        call.ballots = ballots.data_ptr()
        if run(isa, ctypes.byref(call)) != DONE:
            return None
        sums = ballots.sum(dim=-1)
        call.sums = sums.data_ptr()
    done = run(isa, ctypes.byref(call)) == DONE
    return Routing(ids, weights, used, own, settled) if done else None


def _room(incumbents: Incumbents) -> Settled:
    """Where the kernel writes what came of them."""
    rows = len(incumbents.coresets)
    return Settled(
        torch.empty_like(incumbents.coresets),
        torch.empty(rows, dtype=torch.bool),
        torch.empty(rows, dtype=torch.float64),
    )


def _spoken(voters: Tensor | None) -> Tensor | None:
    return None if voters is None else voters.float().contiguous()


def _fits(scores: Scores, voice: Tensor | None) -> bool:
    """Whether all of it lies in memory as the kernel reads it, and nobody asks for a gradient."""
    logits, resident, p = scores.logits, scores.resident, scores.probability
    rows, tokens, _ = logits.shape
    return (
        _plain(logits)
        and not logits.requires_grad
        and (scores.bias is None or _plain(scores.bias))
        and (voice is None or _plain(voice))
        and (resident is None or (resident.dtype == torch.bool and resident.is_contiguous()))
        and (scores.incumbents is None or scores.incumbents.coresets.is_contiguous())
        and p.stride(2) == 1
        and (rows == 1 or p.stride(0) == tokens * p.stride(1))
    )


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
