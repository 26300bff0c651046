"""One layer of experts, timed: ours, a plain read of the same bytes, and the peers, in turns."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coterie import ops
from coterie.bench import worker
from coterie.bench.model import repeated
from coterie.bench.peers import Chosen
from coterie.bench.reading import memory_of
from coterie.bench.routings import bend_for, skewed
from coterie.bench.shapes import Shape
from coterie.bench.turns import DRAWS, Asked, Cases, Found, Line, Sitting, Tell
from coterie.naming import CoterieError
from coterie.quant import FORMATS, QTensor, quantise
from coterie.routing import parse_policy, route
from coterie.values import Routing, Slab


def time_layer(
    asked: Asked,
    peers: Sequence[Chosen],
    *,
    slow: bool = False,
    budget: float,
    tell: Tell = lambda share, doing: None,
) -> Found:
    """All works in turns. Peers share a sitting as far as ``budget`` bytes hold them beside ours.

    A peer that fails is left out, and why is told; where it was asked for by name, it raises.
    """
    torch.set_num_threads(asked.threads)
    shape = asked.shape.layer
    tell(0.0, "making experts")
    slab, cases = our_slab(shape, asked), draw_cases(asked)
    if peers:
        _check_whole(cases)
    found = Found([_line(asked, slab, policy, cases[policy]) for policy in asked.policies])
    groups = sittings(peers, shape.bytes, budget) or [[]]
    for number, group in enumerate(groups):

        def heard(share: float, doing: str, number: int = number) -> None:
            tell((number + share) / len(groups), doing)

        with tempfile.TemporaryDirectory(prefix="coterie-bench-") as folder, ExitStack() as stack:
            _leave(Path(folder), asked, shape, cases)
            sitting = Sitting(asked, slab, cases, found, Path(folder), slow)
            sitting.open(group, stack, heard)
            sitting.take_turns(heard)
    return found


def our_slab(shape: Shape, asked: Asked) -> Slab:
    """The experts that every worker makes too, as they run fastest here."""
    up, down = (torch.from_numpy(few) for few in worker.few_experts(_work(shape, asked)))

    def kept(weight: Tensor) -> Tensor | QTensor:
        if asked.dtype in FORMATS:
            return quantise(weight, FORMATS[asked.dtype])
        return weight if asked.dtype == "fp32" else weight.bfloat16()

    few = ops.prepare(Slab(kept(up), kept(down), torch.arange(worker.FEW)))
    return repeated(few, shape.router.experts)


def sittings(peers: Sequence[Chosen], layer: float, budget: float) -> list[list[Chosen]]:
    """Peers whose memory fits together, in order; one that fits nowhere still gets its own."""
    found: list[list[Chosen]] = []
    room = 0.0
    for who in peers:
        need = who.peer.memory * layer
        if not found or need > room:
            found.append([])
            room = budget
        found[-1].append(who)
        room -= need
    return found


def draw_cases(asked: Asked) -> Cases:
    """By policy, ``DRAWS`` blocks; every policy routes the same scores."""
    shape = asked.shape.layer
    draw = torch.Generator().manual_seed(asked.seed)
    bend = 0.0 if asked.even else bend_for(shape.router, shape.unique)
    scores = [skewed(shape.router, asked.tokens, bend, draw) for _ in range(DRAWS)]
    dtype = torch.float32 if asked.dtype == "fp32" else torch.bfloat16
    xs = [torch.randn(asked.tokens, shape.hidden, generator=draw).to(dtype) for _ in range(DRAWS)]
    found = {}
    for policy in asked.policies:
        chosen = parse_policy(policy)
        routings = [route(one, chosen) for one in scores]
        found[policy] = list(zip(xs, routings, strict=True))
    return found


def _check_whole(cases: Cases) -> None:
    """Peers give every token as many experts as the router does."""
    for policy, blocks in cases.items():
        if any(bool((routing.ids < 0).any()) for _, routing in blocks):
            raise CoterieError(f"{policy} takes experts from tokens, no peer does; --peer none")


def _line(asked: Asked, slab: Slab, policy: str, cases: Sequence[tuple[Tensor, Routing]]) -> Line:
    experts = statistics.fmean(int(routing.used.sum()) for _, routing in cases)
    whole = sum(part.nbytes for part in memory_of([slab.gate_up, slab.down]))
    return Line(policy, experts, experts * whole / asked.shape.spec.router.experts, {}, {})


def _leave(folder: Path, asked: Asked, shape: Shape, cases: Cases) -> None:
    """What a worker reads."""
    every = [case for policy in asked.policies for case in cases[policy]]
    work = json.dumps(asdict(_work(shape, asked)))
    (folder / "work.json").write_text(work, encoding="utf-8")
    np.savez(
        folder / "cases.npz",
        x=np.stack([x.float().numpy() for x, _ in every]),
        ids=np.stack([routing.ids.numpy() for _, routing in every]),
        weights=np.stack([routing.weights.numpy() for _, routing in every]),
    )


def _work(shape: Shape, asked: Asked) -> worker.Work:
    return worker.Work(
        experts=shape.router.experts,
        k=shape.router.k,
        hidden=shape.hidden,
        width=shape.width,
        dtype=asked.dtype,
        seed=asked.seed,
        threads=asked.threads,
    )
