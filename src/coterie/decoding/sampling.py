"""From logits to one proposed token per position, and how sure the model is of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.naming import CoterieError
from coterie.spelling import Amount, Share, Whole, check_options
from coterie.values import Survey


class NotFinite(CoterieError):
    """The model's logits are no numbers."""


BROKEN = "the model's logits are not finite (NaN or inf): nothing was written"
COLDEST = 1e-3  # logits divided by less may leave fp32


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: Amount = 0.0
    top_k: Whole = 0
    top_p: Share = 1.0

    def __post_init__(self) -> None:
        check_options(self)
        if 0 < self.temperature < COLDEST:
            raise CoterieError(
                f"temperature must be 0 (greedy) or at least {COLDEST}, not {self.temperature:g}"
            )


@dataclass(frozen=True)
class Proposal:
    """What the model would write at each of w positions, on the host."""

    ids: Tensor  # [w] int64
    confidence: Tensor  # [w] fp32: probability of that id
    unmask: Tensor  # [w] int64: the same, but never the mask id
    unmask_confidence: Tensor  # [w] fp32: probability of that one
    entropy: Tensor | None = None  # [w] fp32, nats

    def sure(self, ids: Tensor) -> Tensor:
        """Probability of ``ids`` [w], each of which is proposed here, as it is or unmasked."""
        return self.confidence.where(ids == self.ids, self.unmask_confidence)

    def spread(self, at: Tensor, width: int) -> Proposal:
        """The same at positions ``at`` of so many; elsewhere no token, of no confidence."""
        ids = torch.full((2, width), -1)
        ids[:, at] = torch.stack((self.ids, self.unmask))
        parts = [self.confidence, self.unmask_confidence]
        parts += [] if self.entropy is None else [self.entropy]
        wide = torch.zeros(len(parts), width)
        wide[:, at] = torch.stack(parts)
        entropy = None if self.entropy is None else wide[2]
        return Proposal(ids[0], wide[0], ids[1], wide[1], entropy)


def propose(
    logits: Tensor,
    sampling: Sampling,
    mask: int,
    generator: torch.Generator,
    *,
    entropy: bool = False,
    survey: Survey | None = None,
) -> Proposal:
    """Proposal from logits [w, V]; equal logits go to the lower id.

    ``survey`` is theirs and on the host, if it is known.

    Confidence is the probability at the sampling temperature before top-k and top-p cut. Draws are
    w uniform numbers from a generator on the host, so that they depend on neither device nor
    neighbours. NaN raises.
    """
    if survey is not None and sampling.temperature == 0:
        return _surveyed(logits, survey, entropy=entropy)
    heated = logits.float() / (sampling.temperature or 1.0)
    total = heated.logsumexp(dim=-1)
    real = torch.isfinite(total)
    if not _far(logits) and not bool(real.all()):
        raise NotFinite(BROKEN)
    before = generator.get_state()
    if sampling.temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        draws = torch.rand(logits.shape[0], generator=generator).to(logits.device)
        ids = _draw(torch.softmax(heated, dim=-1), sampling, draws)
    unmask = _without(mask, ids, logits)
    both = heated.gather(-1, torch.stack([ids, unmask], dim=-1))  # [w, 2]
    sure = (both - total[:, None]).exp()
    doubt = _doubt(heated) if entropy else None
    if _far(logits):
        # One read: whole numbers and fp32 fit into fp64 as they are.
        real = real & torch.isfinite(logits).all(-1)
        columns = [ids, unmask, real, *sure.unbind(-1)]
        columns += [] if doubt is None else [doubt]
        read = torch.stack([column.double() for column in columns]).cpu()
        ids, unmask, real = (column.long() for column in read[:3])
        sure, doubt = read[3:5].T.float(), read[5].float() if entropy else None
        if not bool(real.all()):
            generator.set_state(before)
            raise NotFinite(BROKEN)
    confidence, unmask_confidence = sure.unbind(-1)
    return Proposal(ids, confidence, unmask, unmask_confidence, doubt)


def _surveyed(logits: Tensor, survey: Survey, *, entropy: bool) -> Proposal:
    """The greedy proposal, of which all but the entropy is on the host already."""
    if not bool(torch.isfinite(survey.total).all()):
        raise NotFinite(BROKEN)
    confidence, unmask_confidence = survey.sure.unbind(-1)
    doubt = _doubt(logits.float()).cpu() if entropy else None
    return Proposal(survey.best, confidence, survey.unmasked, unmask_confidence, doubt)


def _doubt(logits: Tensor) -> Tensor:
    return torch.special.entr(torch.softmax(logits, dim=-1)).sum(dim=-1)


def _far(tensor: Tensor) -> bool:
    """Whether the host waits for whatever it reads of it."""
    return tensor.device.type != "cpu"


def _draw(shares: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Ids [w]: where the shares that top-k and top-p keep, best first, sum past draws [w]."""
    ranked = shares.sort(dim=-1, descending=True, stable=True)
    kept = ranked.values
    if sampling.top_k:
        kept = kept.clone()
        kept[:, sampling.top_k :] = 0
    before = kept.cumsum(dim=-1) - kept
    limit = sampling.top_p * kept.sum(dim=-1, keepdim=True)
    kept = torch.where(before < limit, kept, 0)
    reach = kept.cumsum(dim=-1)
    place = torch.searchsorted(reach, draws[:, None] * reach[:, -1:], right=True)
    last = (kept > 0).sum(dim=-1, keepdim=True) - 1
    # Of NaN nothing is kept; who asked for it finds out, but not by an index of -1.
    return ranked.indices.gather(-1, torch.minimum(place, last).clamp(min=0))[:, 0]


def _without(mask: int, ids: Tensor, logits: Tensor) -> Tensor:
    """``ids``, with the best other token where the id is the mask's."""
    bad = ids == mask
    if _far(logits):
        return torch.where(bad, _best_but(mask, logits), ids)
    if not bool(bad.any()):
        return ids
    rest = logits[bad].clone()
    rest[:, mask] = float("-inf")
    ids = ids.clone()
    ids[bad] = rest.argmax(dim=-1)
    return ids


def _best_but(mask: int, logits: Tensor) -> Tensor:
    """Ids [w] of the best token that is not the mask, in two looks and without a copy."""
    before, after = logits[:, :mask], logits[:, mask + 1 :]
    found = [side.max(dim=-1) for side in (before, after) if side.shape[1]]
    if len(found) == 1:
        return found[0].indices + (0 if mask else 1)
    first, second = found
    later = second.indices + mask + 1
    return torch.where(second.values > first.values, later, first.indices)
