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
from coterie.errors import CoterieError
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.hardware_model import CountArray, SecondsArray
from coterie.lab.replay.policies import MAX_PROBABILITY
from coterie.lab.replay.trace import ForwardKind, Trace, TraceForward
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.offload.store import TrackedExpertStore, total_traffic
from coterie.values import ExpertStore, Scores


@dataclass  # not frozen: it remembers how far it has come
class TraceDrivenModel:
    """What gates think, forward by forward, as a trace of one row has it.

    Own experts and their scores are the trace's. What it does not know, how others score, is drawn:
    each below what the token would take next. Raises CoterieError for a trace that is not whole,
    has a router's bias, or ends before the run does.
    """

    trace: Trace
    seed: int = 0
    index: int = -1  # of the forward that is being computed
    _logits: list[Tensor] = field(init=False)  # [L, N, E] of each forward

    def __post_init__(self) -> None:
        if self.trace.bias is not None:
            raise CoterieError("a trace whose router has a bias cannot be followed")
        if not all(forward.tokens for forward in self.trace.forwards):
            raise CoterieError("forwards whose scores were not kept cannot be followed")
        rng = np.random.default_rng(self.seed)
        experts = self.trace.header.experts
        self._logits = [logits_from_trace(forward, experts, rng) for forward in self.trace.forwards]

    def rewind(self) -> None:
        """From the first forward again."""
        self.index = -1

    def override_scores(self, scores: Scores) -> Scores:
        """In the place of what a gate thought; the first layer that routes turns the page."""
        if scores.moe_index == 0:
            self.index += 1
        if self.index >= len(self._logits):
            raise CoterieError(f"the trace ends after {len(self._logits)} forwards")
        logits = self._logits[self.index][scores.moe_index : scores.moe_index + 1]
        if logits.shape != scores.logits.shape:
            expected_shape, trace_shape = list(scores.logits.shape), list(logits.shape)
            raise CoterieError(
                f"a forward of {expected_shape} cannot follow a trace of {trace_shape}"
            )
        router = replace(scores.router, activation="sigmoid", groups=1, topk_groups=1)
        return replace(scores, logits=logits, router=router, bias=None)


def logits_from_trace(forward: TraceForward, experts: int, rng: np.random.Generator) -> Tensor:
    """Logits [L, N, E] fp32 under which every token takes its own experts, in their order."""
    p = forward.rank.clip(1e-9, MAX_PROBABILITY)
    next_logit = np.log(forward.next_score / (1 - forward.next_score))[..., None]
    gap = rng.exponential(size=(*next_logit.shape[:2], experts))
    logits = (next_logit - gap).astype(np.float32)
    np.put_along_axis(logits, forward.vanilla_ids.astype(np.int64), np.log(p / (1 - p)), axis=-1)
    return torch.from_numpy(logits)


def add_commits(trace: Trace) -> Trace:
    """The same, a block's last forward once more as the one that commits it, as plans have it that
    decode block by block; the last block is not committed."""
    forwards: list[TraceForward] = []
    for forward in trace.forwards:
        if forwards and forwards[-1].block_start != forward.block_start:
            forwards.append(replace(forwards[-1], kind="commit"))
        forwards.append(forward)
    numbered = (replace(forward, number=number) for number, forward in enumerate(forwards))
    return replace(trace, forwards=tuple(numbered))


def drive_with_trace(model: Model, driver: TraceDrivenModel, store: ExpertStore) -> Model:
    """The same model over this store, its gates unheard."""
    header = driver.trace.header
    sizes = (len(model.spec.moe_layers), model.spec.router.experts, model.spec.router.k)
    if sizes != (len(header.layers), header.experts, header.k):
        raise CoterieError(f"{model.name} has other layers or experts than {header.model}")
    layers = tuple(
        replace(
            layer,
            feed_forward=replace(
                layer.feed_forward, score_override=driver.override_scores, store=store
            ),
        )
        if isinstance(layer.feed_forward, MoE)
        else layer
        for layer in model.transformer.layers
    )
    return replace(model, transformer=replace(model.transformer, layers=layers))


@dataclass(frozen=True)
class TimedRun:
    """Forwards of a whole model, in order: what each was for, what it took, and the experts that
    all its layers used and loaded together, [P]."""

    kinds: tuple[ForwardKind, ...]
    seconds: SecondsArray
    stalls: SecondsArray  # in which nothing was computed
    used: CountArray
    loads: CountArray
    tokens: int  # that were written

    @property
    def decode_forwards(self) -> int:
        """Forwards that decode."""
        return self.kinds.count("decode")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / float(self.seconds.sum())


def run_trace(
    model: Model, driver: TraceDrivenModel, replay_policy: ReplayPolicy, store: TrackedExpertStore
) -> TimedRun:
    """Write a trace's blocks with a whole model that routes as the trace did, under a policy.

    One token is the prompt; every block takes as many forwards as it took in the trace. Raises
    CoterieError where the model makes other forwards than the trace.
    """
    trace = driver.trace
    driver.rewind()
    engine = Engine(drive_with_trace(model, driver, store))
    request_id = engine.submit(
        [0], policy=replay_policy.policy, **_generation_options(trace, replay_policy)
    )
    tokens, rows = len(engine.sequence(request_id).canvas.tokens), []
    for forward in trace.forwards:
        next_pass = engine.sequence(request_id).next_pass if request_id in engine.rows else None
        if next_pass is None or next_pass.kind != forward.kind:
            status = "is done" if next_pass is None else f"goes on with a {next_pass.kind}"
            raise CoterieError(f"the model {status} where the trace has a {forward.kind}")
        counters_before, start = _traffic_counters(store), time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - start
        rows.append(
            (
                elapsed,
                *(b - a for a, b in zip(counters_before, _traffic_counters(store), strict=True)),
            )
        )
    if request_id in engine.rows:
        raise CoterieError(f"the model goes on after the trace's {len(trace.forwards)} forwards")
    seconds, used, loads, stalls = (np.array(column) for column in zip(*rows, strict=True))
    kinds: tuple[ForwardKind, ...] = tuple(forward.kind for forward in trace.forwards)
    return TimedRun(kinds, seconds, stalls, used, loads, tokens - 1)


def _generation_options(trace: Trace, replay_policy: ReplayPolicy) -> dict[str, object]:
    """Options of a generation that makes a trace's forwards."""
    decode = [forward.block_start for forward in trace.forwards if forward.kind == "decode"]
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
        "commit": "policy" if replay_policy.routes_commits else "vanilla",
        **(
            {}
            if replay_policy.reuse_tolerance is None
            else {"drift": replay_policy.reuse_tolerance}
        ),
    }


def _traffic_counters(store: TrackedExpertStore) -> tuple[int, int, float]:
    """Experts used and moved, and seconds waited, so far."""
    traffic = total_traffic(store)
    return traffic.experts_used, traffic.experts_moved, traffic.stall_seconds
