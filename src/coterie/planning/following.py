"""A whole model that routes as a trace did: its gates compute, and the trace is believed instead.

So weights need not mean anything, and attention, shared experts, head and the loop of decoding take
their time all the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.load import Model
from coterie.experts.offload import Offloaded
from coterie.model.moe import MoE
from coterie.naming import CoterieError
from coterie.planning.booking import Play
from coterie.planning.elections import SURE
from coterie.planning.machine import Counts, Seconds
from coterie.planning.trace import Forward, Kind, Trace
from coterie.values import Scores, Store


@dataclass  # not frozen: it remembers how far it has come
class Following:
    """What gates think, forward by forward, as a trace of one row has it.

    Own experts and their scores are the trace's. What it does not know, how others score, is drawn:
    each below what the token would take next. Raises CoterieError for a trace that is not whole,
    has a router's bias, or ends before the run does.
    """

    trace: Trace
    seed: int = 0
    place: int = -1  # of the forward that is being computed
    _logits: list[Tensor] = field(init=False)  # [L, N, E] of each forward

    def __post_init__(self) -> None:
        if self.trace.bias is not None:
            raise CoterieError("a trace whose router has a bias cannot be followed")
        if not all(forward.tokens for forward in self.trace.forwards):
            raise CoterieError("forwards whose scores were not kept cannot be followed")
        draw = np.random.default_rng(self.seed)
        experts = self.trace.about.experts
        self._logits = [thought(forward, experts, draw) for forward in self.trace.forwards]

    def begin(self) -> None:
        """From the first forward again."""
        self.place = -1

    def told(self, scores: Scores) -> Scores:
        """In the place of what a gate thought; the first layer that routes turns the page."""
        if scores.ordinal == 0:
            self.place += 1
        if self.place >= len(self._logits):
            raise CoterieError(f"the trace ends after {len(self._logits)} forwards")
        logits = self._logits[self.place][scores.ordinal : scores.ordinal + 1]
        if logits.shape != scores.logits.shape:
            wanted, known = list(scores.logits.shape), list(logits.shape)
            raise CoterieError(f"a forward of {wanted} cannot follow a trace of {known}")
        router = replace(scores.router, activation="sigmoid", groups=1, kept_groups=1)
        return replace(scores, logits=logits, router=router, bias=None)


def thought(forward: Forward, experts: int, draw: np.random.Generator) -> Tensor:
    """Logits [L, N, E] fp32 under which every token takes its own experts, in their order."""
    p = forward.rank.clip(1e-9, SURE)
    following = np.log(forward.following / (1 - forward.following))[..., None]
    below = draw.exponential(size=(*following.shape[:2], experts))
    logits = (following - below).astype(np.float32)
    np.put_along_axis(logits, forward.ids.astype(np.int64), np.log(p / (1 - p)), axis=-1)
    return torch.from_numpy(logits)


def with_commits(trace: Trace) -> Trace:
    """The same, a block's last forward once more as the one that commits it, as plans have it that
    decode block by block; the last block is not committed."""
    found: list[Forward] = []
    for forward in trace.forwards:
        if found and found[-1].block != forward.block:
            found.append(replace(found[-1], kind="commit"))
        found.append(forward)
    numbered = (replace(forward, number=number) for number, forward in enumerate(found))
    return replace(trace, forwards=tuple(numbered))


def following(model: Model, followed: Following, store: Store) -> Model:
    """The same model over this store, its gates unheard."""
    about = followed.trace.about
    sizes = (len(model.spec.moe_layers), model.spec.router.experts, model.spec.router.k)
    if sizes != (len(about.layers), about.experts, about.k):
        raise CoterieError(f"{model.name} has other layers or experts than {about.model}")
    layers = tuple(
        replace(one, feed_forward=replace(one.feed_forward, told=followed.told, store=store))
        if isinstance(one.feed_forward, MoE)
        else one
        for one in model.transformer.layers
    )
    return replace(model, transformer=replace(model.transformer, layers=layers))


@dataclass(frozen=True)
class Ran:
    """Forwards of a whole model, in order: what each was for, what it took, and the experts that
    all its layers used and loaded together, [P]."""

    kinds: tuple[Kind, ...]
    seconds: Seconds
    stalls: Seconds  # in which nothing was computed
    used: Counts
    loads: Counts
    tokens: int  # that were written

    @property
    def decoding(self) -> int:
        """Forwards that decode."""
        return self.kinds.count("decode")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / float(self.seconds.sum())


def run(model: Model, followed: Following, play: Play, store: Store) -> Ran:
    """Write a trace's blocks with a whole model that routes as the trace did, under a policy.

    One token is the prompt; every block takes as many forwards as it took in the trace. Raises
    CoterieError where the model makes other forwards than the trace.
    """
    trace = followed.trace
    followed.begin()
    engine = Engine(following(model, followed, store))
    number = engine.submit([0], policy=play.policy, **_asked(trace, play))
    tokens, rows = len(engine.row(number).canvas.tokens), []
    for forward in trace.forwards:
        look = engine.row(number).look if number in engine.rows else None
        if look is None or look.kind != forward.kind:
            said = "is done" if look is None else f"goes on with a {look.kind}"
            raise CoterieError(f"the model {said} where the trace has a {forward.kind}")
        before, began = _counted(store), time.perf_counter()
        engine.step()
        taken = time.perf_counter() - began
        rows.append((taken, *(b - a for a, b in zip(before, _counted(store), strict=True))))
    if number in engine.rows:
        raise CoterieError(f"the model goes on after the trace's {len(trace.forwards)} forwards")
    seconds, used, loads, stalls = (np.array(column) for column in zip(*rows, strict=True))
    kinds: tuple[Kind, ...] = tuple(forward.kind for forward in trace.forwards)
    return Ran(kinds, seconds, stalls, used, loads, tokens - 1)


def _asked(trace: Trace, play: Play) -> dict[str, object]:
    """Options of a generation that makes a trace's forwards."""
    decode = [forward.block for forward in trace.forwards if forward.kind == "decode"]
    steps = {decode.count(block) for block in decode}
    widths = {forward.tokens for forward in trace.forwards}
    if len(steps) != 1 or len(widths) != 1:
        raise CoterieError("only blocks of one width, each in as many forwards, can be followed")
    (width,) = widths
    return {
        "max_new_tokens": width * len(set(decode)) - 1,
        "block": width,
        "plan": "block-causal",
        "unmask": f"fixed:steps={steps.pop()}",
        "early_stop": "off",
        "commit": "policy" if play.commits else "vanilla",
        **({} if play.drift is None else {"drift": play.drift}),
    }


def _counted(store: Store) -> tuple[int, int, float]:
    """Experts used and moved, and seconds waited, so far."""
    if not isinstance(store, Offloaded):
        return 0, 0, 0.0
    traffic = store.ledger.traffic()
    return traffic.used, traffic.moved, store.courier.waited
