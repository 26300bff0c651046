"""Traces made: real runs watched, forward by forward, those too that only write keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from coterie.engine.config import Generation
from coterie.engine.engine import Engine, Prompt
from coterie.engine.event import Result
from coterie.engine.load import Model
from coterie.engine.watch import Watched, watch
from coterie.model.moe import MoE
from coterie.model.spec import ModelSpec
from coterie.model.weights import expert_bytes
from coterie.planning.coding import Floats, Mask
from coterie.planning.trace import WHOLE, About, Forward, Writer
from coterie.quant import FORMATS
from coterie.routing.select import choose
from coterie.values import Scores


@dataclass  # not frozen: it gathers a forward's layers until all have come
class Recording:
    """Shown what ``watch`` sees, it writes each forward once its last layer has been."""

    writer: Writer
    _layers: list[Watched] = field(default_factory=list)
    _number: int = 0

    def see(self, watched: Watched) -> None:
        self._layers.append(watched)
        if len(self._layers) == len(self.writer.about.layers):
            for place in range(len(watched.rows)):
                self.writer.write(row_of(self._layers, place, self._number))
            self._layers.clear()
            self._number += 1


def record_trace(
    engine: Engine,
    prompts: Sequence[Prompt],
    writer: Writer,
    *,
    policy: str = "vanilla",
    rows: int = 1,
    forwards: int | None = None,
    heard: Callable[[Result], object] | None = None,
    **options: object,
) -> list[Result]:
    """Answer the prompts, ``rows`` at a time, each forward into ``writer``.

    A row is given up after so many ``forwards``; ``options`` are fields of ``Generation``.
    """
    see = Recording(writer).see
    return watch(
        *(engine, prompts, see),
        policy=policy, rows=rows, layers=None, forwards=forwards, heard=heard, every=True,
        fresh=False, **options,
    )  # fmt: skip


def row_of(layers: Sequence[Watched], place: int, number: int) -> Forward:
    """One row of a forward as a trace keeps it, from all its layers in order."""
    first = layers[0]
    scores, progress = first.scores, first.scores.progress
    tokens = scores.logits.shape[1] if first.kind in WHOLE else 0
    voters = _marks(scores.voters, place, tokens, default=True)
    ranked = [_ranked(seen.scores, place, tokens) for seen in layers]
    return Forward(
        number=number,
        row=first.rows[place],
        forward=scores.forward[place],
        block=first.starts[place] + (int(voters.argmax()) if tokens else 0),
        start=first.starts[place],
        voters=voters,
        masked=_marks(progress and progress.masked, place, tokens),
        filled=_marks(progress and progress.filled, place, tokens),
        ids=np.stack([ids for ids, _, _ in ranked]),
        rank=np.stack([rank for _, rank, _ in ranked]),
        following=np.stack([following for _, _, following in ranked]),
        used=np.stack([_used(seen, place) for seen in layers]),
        kind=first.kind,
    )


def about(
    engine: Engine,
    *,
    policy: str,
    generation: Generation,
    prompts: Mapping[str, object],
    made: Mapping[str, object],
) -> About:
    """What a trace of this engine says of itself."""
    model, spec = engine.model, engine.model.spec
    return About(
        model=model.name,
        policy=policy,
        plan=generation.plan,
        unmask=generation.unmask,
        layers=spec.moe_layers,
        experts=spec.router.experts,
        k=spec.router.k,
        expert_bytes=bytes_by_precision(spec),
        biased_weight=spec.router.biased_weight,
        commit=generation.commit,
        prompts=prompts,
        made=made,
    )


def bias_of(model: Model) -> Floats | None:
    """[L, E] fp32 of the layers that route; None where the model has none."""
    layers = [model.transformer.layers[layer].feed_forward for layer in model.spec.moe_layers]
    found = [layer.bias for layer in layers if isinstance(layer, MoE) and layer.bias is not None]
    return torch.stack(found).float().cpu().numpy() if found else None


def bytes_by_precision(spec: ModelSpec) -> dict[str, int]:
    """Of one routed expert, in 16 bits and in every format of ``quant``; packed, with what that
    adds, where this model's are."""
    forms = {"bf16": None, **FORMATS}
    kept = {name: replace(spec, expert_format=form) for name, form in forms.items()}
    return {name: expert_bytes(one, torch.bfloat16) for name, one in kept.items()}


def _ranked(scores: Scores, place: int, tokens: int) -> tuple[np.ndarray, Floats, Floats]:
    """Own ids [N, k], what they score, and what the next would score, of one row; N is 0 or all."""
    if not tokens:
        none = np.zeros((0, scores.router.k), np.float32)
        return none.astype(np.int16), none, none[:, 0]
    one = replace(
        scores,
        logits=scores.logits[place : place + 1],
        own=None if scores.own is None else scores.own[place : place + 1],
    )
    k = scores.router.k
    own = choose(one, None) if one.own is None else one.own
    rank = one.rank.gather(-1, own)[0]
    last = choose(one, None, min(k + 1, scores.router.experts))[..., -1:]
    following = one.rank.gather(-1, last)[0, :, 0]
    return own[0].cpu().numpy().astype(np.int16), _floats(rank), _floats(following)


def _used(seen: Watched, place: int) -> Mask:
    ids = seen.routing.ids.view(*seen.scores.logits.shape[:2], -1)[place].cpu().numpy()
    mask = np.zeros(seen.scores.router.experts, dtype=bool)
    mask[ids[ids >= 0]] = True
    return mask


def _marks(tensor: Tensor | None, place: int, tokens: int, *, default: bool = False) -> Mask:
    if tensor is None:
        return np.full(tokens, default)
    return (tensor[place, :tokens] > 0).cpu().numpy()


def _floats(tensor: Tensor) -> Floats:
    return tensor.float().cpu().numpy()
