"""Sampling: one proposed token for each position, and its confidence, from logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from coterie.errors import ConfigError, NonFiniteLogitsError
from coterie.specs import NonNegativeFloat, NonNegativeInt, PositiveFraction, check_options
from coterie.values import LogitsSummary

NON_FINITE_MESSAGE = "the model's logits are NaN or infinite: no token was written"
MIN_TEMPERATURE = 1e-3  # logits divided by less may overflow fp32


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: NonNegativeFloat = 0.0
    top_k: NonNegativeInt = 0
    top_p: PositiveFraction = 1.0

    def __post_init__(self) -> None:
        check_options(self)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, "
                f"not {self.temperature:g}"
            )


@dataclass(frozen=True)
class Proposal:
    """The model's proposal for each of w positions, on the host."""

    ids: Tensor  # [w] int64
    confidence: Tensor  # [w] fp32: the probability of that id
    unmasked_ids: Tensor  # [w] int64: the same, but never the mask
    unmasked_confidence: Tensor  # [w] fp32: the probability of that id
    entropy: Tensor | None = None  # [w] fp32, nats

    def confidence_of(self, ids: Tensor) -> Tensor:
        """The probability of ids [w], each from ``ids`` or ``unmasked_ids``."""
        return self.confidence.where(ids == self.ids, self.unmasked_confidence)

    def scatter(self, indices: Tensor, width: int) -> Proposal:
        """The same at positions ``indices`` of ``width``; elsewhere id -1 with confidence 0."""
        ids = torch.full((2, width), -1)
        ids[:, indices] = torch.stack((self.ids, self.unmasked_ids))
        parts = [self.confidence, self.unmasked_confidence]
        parts += [] if self.entropy is None else [self.entropy]
        scattered = torch.zeros(len(parts), width)
        scattered[:, indices] = torch.stack(parts)
        entropy = None if self.entropy is None else scattered[2]
        return Proposal(ids[0], scattered[0], ids[1], scattered[1], entropy)


def propose(
    logits: Tensor,
    sampling: Sampling,
    mask_id: int,
    generator: torch.Generator,
    *,
    entropy: bool = False,
    summary: LogitsSummary | None = None,
    sort: bool = True,
) -> Proposal:
    """The proposal from logits [w, V]; of equal logits the lower id wins.

    ``summary`` is that of the logits, on the host, if it is known. Confidence is the probability at
    the sampling temperature before the top-k and top-p cut. A generator on the host draws w uniform
    numbers, so they depend neither on the device nor on the batch. Without ``sort`` a draw that no
    cut limits goes through the ids in their order, which is faster. Raises NonFiniteLogitsError and
    leaves the generator as it was.
    """
    if summary is not None and sampling.temperature == 0:
        return _propose_from_summary(logits, summary, entropy=entropy)
    scaled = logits.float() / (sampling.temperature or 1.0)
    logsumexp = scaled.logsumexp(dim=-1)
    finite = torch.isfinite(logsumexp)
    if not _is_on_device(logits) and not bool(finite.all()):
        raise NonFiniteLogitsError(NON_FINITE_MESSAGE)
    generator_state = generator.get_state()
    if sampling.temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        uniform = torch.rand(logits.shape[0], generator=generator).to(logits.device)
        probabilities = torch.softmax(scaled, dim=-1)
        uncut = not sort and not sampling.top_k and sampling.top_p == 1
        draw = _sample_by_id if uncut else partial(_sample, sampling)
        ids = draw(probabilities, uniform)
    unmasked_ids = _replace_mask(mask_id, ids, logits)
    candidate_logits = scaled.gather(-1, torch.stack([ids, unmasked_ids], dim=-1))  # [w, 2]
    probabilities = (candidate_logits - logsumexp[:, None]).exp()
    entropies = _entropies(scaled) if entropy else None
    if _is_on_device(logits):
        # One transfer: token ids and fp32 are exact in fp64.
        finite = finite & torch.isfinite(logits).all(-1)
        columns = [ids, unmasked_ids, finite, *probabilities.unbind(-1)]
        columns += [] if entropies is None else [entropies]
        host_values = torch.stack([column.double() for column in columns]).cpu()
        ids, unmasked_ids, finite = (column.long() for column in host_values[:3])
        probabilities = host_values[3:5].T.float()
        entropies = host_values[5].float() if entropy else None
        if not bool(finite.all()):
            generator.set_state(generator_state)
            raise NonFiniteLogitsError(NON_FINITE_MESSAGE)
    confidence, unmasked_confidence = probabilities.unbind(-1)
    return Proposal(ids, confidence, unmasked_ids, unmasked_confidence, entropies)


def _propose_from_summary(logits: Tensor, summary: LogitsSummary, *, entropy: bool) -> Proposal:
    """The greedy proposal; everything but the entropy is on the host already."""
    if not bool(torch.isfinite(summary.logsumexp).all()):
        raise NonFiniteLogitsError(NON_FINITE_MESSAGE)
    confidence, unmasked_confidence = summary.probabilities.unbind(-1)
    entropies = _entropies(logits.float()).cpu() if entropy else None
    return Proposal(
        summary.argmax, confidence, summary.unmasked_argmax, unmasked_confidence, entropies
    )


def _entropies(logits: Tensor) -> Tensor:
    return torch.special.entr(torch.softmax(logits, dim=-1)).sum(dim=-1)


def _is_on_device(tensor: Tensor) -> bool:
    """Whether reading the tensor makes the host wait for a device."""
    return tensor.device.type != "cpu"


def _sample_by_id(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Ids [w] by inverse transform sampling, from draws [w]."""
    cumulative = probabilities.cumsum(dim=-1)
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return index.where(index < probabilities.shape[-1], probabilities.argmax(dim=-1))


def _sample(sampling: Sampling, probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Ids [w] by inverse transform sampling of what top-k and top-p keep, from draws [w]."""
    sorted_probs = probabilities.sort(dim=-1, descending=True, stable=True)
    retained = sorted_probs.values
    if sampling.top_k:
        retained = retained.clone()
        retained[:, sampling.top_k :] = 0
    mass_before = retained.cumsum(dim=-1) - retained
    limit = sampling.top_p * retained.sum(dim=-1, keepdim=True)
    retained = torch.where(mass_before < limit, retained, 0)
    cumulative = retained.cumsum(dim=-1)
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    last = (retained > 0).sum(dim=-1, keepdim=True) - 1
    # NaN keeps nothing: the index must stay valid until the caller raises.
    return sorted_probs.indices.gather(-1, torch.minimum(index, last).clamp(min=0))[:, 0]


def _replace_mask(mask_id: int, ids: Tensor, logits: Tensor) -> Tensor:
    """``ids``, with the best other token in place of the mask."""
    is_mask = ids == mask_id
    if _is_on_device(logits):
        return torch.where(is_mask, _best_unmasked(mask_id, logits), ids)
    if not bool(is_mask.any()):
        return ids
    rest = logits[is_mask].clone()
    rest[:, mask_id] = float("-inf")
    ids = ids.clone()
    ids[is_mask] = rest.argmax(dim=-1)
    return ids


def _best_unmasked(mask_id: int, logits: Tensor) -> Tensor:
    """Ids [w] of the best token other than the mask, from two views and without a copy."""
    before, after = logits[:, :mask_id], logits[:, mask_id + 1 :]
    maxima = [side.max(dim=-1) for side in (before, after) if side.shape[1]]
    if len(maxima) == 1:
        return maxima[0].indices + (0 if mask_id else 1)
    first, second = maxima
    later = second.indices + mask_id + 1
    return torch.where(second.values > first.values, later, first.indices)
