"""How near policies stay to vanilla: the same inputs of the same layers, routed again by each.

Every number is a mean over looks; a look is one row in one layer in one decoding forward of
vanilla. *Words* are the positions of the answer up to its end-of-text, without the prompt before
and the fill behind; *open* ones are still masked. Intervals are bootstraps over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from coterie.engine.event import Result
from coterie.engine.watch import Watched, moe_output, watch
from coterie.naming import CoterieError
from coterie.routing import needs_importance, parse_policy, route
from coterie.study.lab import Lab
from coterie.telemetry import figures
from coterie.values import Routing, membership

Sums = NDArray[np.float64]  # [.., columns]
Tell = Callable[[float], None]  # share of it done

LAYERS = 4  # of those that route, evenly spread: a large model's need not all be looked at
FORWARDS = 24  # of a row, from its first
SLOW = 8  # forwards a block where steps are to be told apart: a sure model takes one or two
DRAWS = 1000
COLUMNS = (
    *("looks", "unique", "squared", "held", "votes", "hits", "choices", "loss", "cosine"),
    *("word_looks", "word_hits", "word_choices", "word_loss", "open_looks", "open_loss"),
)
AT = {name: place for place, name in enumerate(COLUMNS)}


class Reading(TypedDict):
    """One policy; ``spread`` is the standard deviation of ``experts`` over looks.

    ``experts`` counts unique experts really used; ``mass`` votes for them (of all votes);
    ``loss`` |y - y_vanilla|^2 / |y_vanilla|^2 of the layer's output; ``cosine`` of the two.
    """

    policy: str
    experts: float
    spread: float
    mass: float
    recall: float
    loss: float
    cosine: float
    word_recall: float
    word_loss: float
    open_loss: float
    recall_interval: list[float]
    loss_interval: list[float]


class Gap(TypedDict):
    """A policy less the curve at the same number of experts, with its 95 % interval."""

    policy: str
    experts: float
    value: float  # of the policy
    curve: float  # of the curve there
    gap: float
    interval: list[float]


@dataclass(frozen=True)
class Traced:
    """Prompts that vanilla has answered once, so that later looks know where answers end."""

    prompts: tuple[str, ...]
    results: tuple[Result, ...]
    layers: tuple[int, ...]
    unmask: str

    @property
    def looks(self) -> int:
        """Rows in layers in forwards that ``see`` will be shown."""
        return sum(min(result.forwards, FORWARDS) for result in self.results) * len(self.layers)


@dataclass  # not frozen: it adds up
class Tally:
    """Sums of every policy, prompt by prompt: [policies, prompts, columns]."""

    policies: tuple[str, ...]
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))


def traced(lab: Lab, *, slow: bool = False) -> Traced:
    """The lab's questions as the model is used, or ``slow``: in ``SLOW`` forwards a block."""
    prompts = lab.questions()
    unmask = f"fixed:steps={SLOW}" if slow else lab.engine.generation.unmask
    results = watch(lab.engine, prompts, lambda _: None, unmask=unmask, forwards=FORWARDS)
    if not any(result.forwards for result in results):
        raise CoterieError("no decoding forward was made")
    return Traced(tuple(prompts), tuple(results), some_layers(lab), unmask)


def some_layers(lab: Lab, count: int = LAYERS) -> tuple[int, ...]:
    """At most so many of the layers that route, the first and the last among them."""
    there = lab.engine.model.spec.moe_layers
    if len(there) <= count:
        return there
    places = np.linspace(0, len(there) - 1, count).round().astype(int)
    return tuple(there[place] for place in places)


def look_again(lab: Lab, trace: Traced, see: Callable[[Watched], None], tell: Tell) -> None:
    """Vanilla's forwards once more, shown to ``see``."""
    done = 0

    def seen(watched: Watched) -> None:
        nonlocal done
        see(watched)
        done += len(watched.rows)
        tell(min(1.0, done / max(1, trace.looks)))

    watch(
        lab.engine,
        trace.prompts,
        seen,
        layers=trace.layers,
        forwards=FORWARDS,
        unmask=trace.unmask,
    )


def words(trace: Traced, watched: Watched) -> Tensor:
    """Bool [S, N]: positions of the answer, its end-of-text included."""
    place = torch.tensor(watched.starts)[:, None] + torch.arange(watched.x.shape[1])
    ends = torch.tensor([trace.results[row].new_tokens for row in watched.rows])[:, None]
    return ((place >= 0) & (place <= ends)).to(watched.x.device)


def compared(lab: Lab, trace: Traced, policies: Sequence[str], tell: Tell) -> Tally:
    """Every policy on every look. Memory: one layer of one forward."""
    parsed = [parse_policy(policy) for policy in policies]
    if any(map(needs_importance, parsed)):
        raise CoterieError("importance is not watched: mc-moe cannot be compared here")
    sums = torch.zeros(len(policies), len(trace.prompts), len(COLUMNS), dtype=torch.float64)

    def see(watched: Watched) -> None:
        vanilla = moe_output(lab.engine.model, watched, watched.routing)
        here = words(trace, watched)
        rows = torch.tensor(watched.rows)
        for number, policy in enumerate(parsed):
            routing = route(watched.scores, policy)
            other = moe_output(lab.engine.model, watched, routing)
            sums[number].index_add_(0, rows, measured(watched, routing, other, vanilla, here).cpu())

    look_again(lab, trace, see, tell)
    return Tally(tuple(policies), sums)


def measured(
    watched: Watched, routing: Routing, other: Tensor, vanilla: Tensor, words: Tensor
) -> Tensor:
    """[S, columns] float64 of one policy in one layer; outputs are [S, N, H], words [S, N]."""
    unique, _, held, votes, hits, choices = figures(watched.scores, routing).unbind(-1)
    missed = (other.double() - vanilla.double()).square().sum(-1)  # [S, N]
    whole = vanilla.double().square().sum(-1)
    cosine = F.cosine_similarity(other.double(), vanilla.double(), dim=-1).mean(-1)
    own = kept(watched, routing)
    ahead = words & masked(watched)
    columns = {
        "looks": torch.ones_like(unique),
        "unique": unique,
        "squared": unique.square(),
        "held": held,
        "votes": votes,
        "hits": hits,
        "choices": choices,
        "loss": missed.sum(-1) / whole.sum(-1),
        "cosine": cosine,
        "word_looks": words.any(-1).double(),
        "word_hits": (own * words).sum(-1).double(),
        "word_choices": (words.sum(-1) * watched.scores.router.k).double(),
        "word_loss": _share(missed, whole, words),
        "open_looks": ahead.any(-1).double(),
        "open_loss": _share(missed, whole, ahead),
    }
    return torch.stack([columns[name] for name in COLUMNS], dim=-1)


def masked(watched: Watched) -> Tensor:
    """Bool [S, N]: positions still masked."""
    progress = watched.scores.progress
    if progress is None or progress.masked is None:
        raise RuntimeError("the engine tells how far decoding is")
    return progress.masked


def kept(watched: Watched, routing: Routing) -> Tensor:
    """[S, N]: how many of a token's own experts it still has."""
    shape = watched.scores.logits.shape
    there = membership(routing.ids, shape[-1])  # [T, E]
    return there.gather(-1, routing.own).sum(-1).view(shape[:2])


FIGURES: Mapping[str, Callable[[Sums], Sums]] = {  # each from sums [.., columns]
    "experts": lambda sums: _ratio(sums, "unique", "looks"),
    "mass": lambda sums: _ratio(sums, "held", "votes"),
    "recall": lambda sums: _ratio(sums, "hits", "choices"),
    "loss": lambda sums: _ratio(sums, "loss", "looks"),
    "cosine": lambda sums: _ratio(sums, "cosine", "looks"),
    "word_recall": lambda sums: _ratio(sums, "word_hits", "word_choices"),
    "word_loss": lambda sums: _ratio(sums, "word_loss", "word_looks"),
    "open_loss": lambda sums: _ratio(sums, "open_loss", "open_looks"),
}


def readings(tally: Tally) -> list[Reading]:
    """One a policy, in their order."""
    whole, drawn = tally.sums.sum(dim=1).numpy(), resampled(tally.sums)
    found = {name: figure(whole) for name, figure in FIGURES.items()}
    squares = _ratio(whole, "squared", "looks") - found["experts"] ** 2
    intervals = {name: _interval(FIGURES[name](drawn)) for name in ("recall", "loss")}
    return [
        cast(
            "Reading",
            {
                "policy": policy,
                **{name: float(values[place]) for name, values in found.items()},
                "spread": float(np.sqrt(max(0.0, squares[place]))),
                **{f"{name}_interval": ends[place] for name, ends in intervals.items()},
            },
        )
        for place, policy in enumerate(tally.policies)
    ]


def gaps(
    tally: Tally, policies: Sequence[str], curve: Sequence[str], figure: str = "loss"
) -> list[Gap]:
    """How each policy's figure differs from a curve of policies, at the policy's own size.

    Between the curve's points it is taken as straight; a policy beyond its ends is left out.
    """
    whole, drawn = tally.sums.sum(dim=1).numpy()[None], resampled(tally.sums)
    line = [tally.policies.index(policy) for policy in curve]
    found = []
    for policy in policies:
        place = tally.policies.index(policy)
        size = float(FIGURES["experts"](whole)[0, place])
        ends = FIGURES["experts"](whole)[0, line]
        if not ends.min() <= size <= ends.max():
            continue
        value, there = _beside(whole, place, line, figure)
        gap = np.subtract(*_beside(drawn, place, line, figure))
        found.append(
            Gap(
                policy=policy,
                experts=size,
                value=float(value[0]),
                curve=float(there[0]),
                gap=float(value[0] - there[0]),
                interval=_interval(gap[:, None])[0],
            )
        )
    return found


def resampled(sums: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Sums:
    """Bootstrap over prompts: [policies, prompts, C] -> [draws, policies, C]."""
    prompts = sums.shape[1]
    lots = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, size=draws)
    return np.einsum("dn,pnc->dpc", lots.astype(np.float64), sums.numpy())


def _beside(sums: Sums, place: int, line: Sequence[int], figure: str) -> tuple[Sums, Sums]:
    """[draws] twice: the policy's figure, and the curve's at the policy's number of experts."""
    sizes, values = FIGURES["experts"](sums), FIGURES[figure](sums)
    order = np.argsort(sizes[:, line], axis=1, kind="stable")
    ends, heights = (np.take_along_axis(of[:, line], order, axis=1) for of in (sizes, values))
    return values[:, place], interpolated(sizes[:, place], ends, heights)


def interpolated(size: Sums, ends: Sums, heights: Sums) -> Sums:
    """[draws]: at size [draws] on lines through (ends, heights) [draws, points], from left to
    right; the ends' heights go on beyond them."""
    right = (ends < size[:, None]).sum(axis=1).clip(1, ends.shape[1] - 1)[:, None]
    (x0, x1), (y0, y1) = (
        [np.take_along_axis(of, at, axis=1)[:, 0] for at in (right - 1, right)]
        for of in (ends, heights)
    )
    share = np.where(x1 > x0, (size - x0) / np.where(x1 > x0, x1 - x0, 1.0), 1.0)
    return y0 + share.clip(0.0, 1.0) * (y1 - y0)


def _share(missed: Tensor, whole: Tensor, where: Tensor) -> Tensor:
    """[S]: missed of whole [S, N] at some positions; 0 where there are none."""
    return (missed * where).sum(-1) / (whole * where).sum(-1).where(where.any(-1), 1.0)


def _ratio(sums: Sums, over: str, under: str) -> Sums:
    """Where nothing was looked at, of choices: all kept; of losses: none."""
    below = sums[..., AT[under]]
    nothing = 1.0 if under in ("choices", "word_choices", "votes") else 0.0
    return np.where(below > 0, sums[..., AT[over]] / np.where(below > 0, below, 1.0), nothing)


def _interval(drawn: Sums) -> list[list[float]]:
    """[draws, n] -> n pairs: the middle 95 %."""
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]
