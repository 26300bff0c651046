"""Two precisions in LLaDA2.0-mini's sizes, routing drawn: a part of ``precision.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from coterie.engine.coarse import Coarse, Split
from coterie.engine.distance import distance
from coterie.experts.eviction import Lru
from coterie.keys import from_json, to_json
from coterie.ops.panels import expert_bytes
from coterie.planning.booking import Cache, Memory, Play, book, choose
from coterie.planning.precisions import CAME, Mixture, mix
from coterie.planning.synthetic import MINI, Law, synthetic
from coterie.quant import FORMATS, quantise
from coterie.routing import parse_policy
from coterie.values import Slab

LAW = Path("results/replay-drawn-mini.json")  # whose routing is drawn again
HIDDEN, WIDTH = 2048, 512
BLOCKS = 16
POLICIES = ("vanilla", "des-vote:beta=0.15", "des-vote:beta=0.1")
PLACEMENTS = (
    *(f"upgrades:most={most},share={share}" for most in (2, 8) for share in (0.25, 0.5, 0.75)),
    *(f"ballot:mass={mass},share={share}" for mass in (0.5, 0.7, 0.85) for share in (0.5, 0.75)),
)


def drawn(share: float) -> dict[str, object]:
    """Bytes a forward, and the loss bound, of each precision alone and of both."""
    law = from_json(Law, json.loads(LAW.read_text())["facts"]["as read off"]["law"])
    trace = synthetic(MINI, law, blocks=BLOCKS, seed=7)
    memory = Memory.of(trace)
    sizes = {kind: expert_bytes(kind, hidden=HIDDEN, width=WIDTH) for kind in ("int8", "int4")}
    errors = {kind: gaussian_error(kind) for kind in sizes}
    room = int(share * MINI.experts) * sizes["int8"]
    lines = []
    for policy in POLICIES:
        chosen = choose(memory, Play(parse_policy(policy)))
        forwards = len(memory.passes)
        for kind, size in sizes.items():
            held = book(memory, Play(parse_policy(policy)), chosen, Cache(Lru(), room // size))
            lines.append(
                {
                    "policy": policy,
                    "memory": kind,
                    "slots": room // size,
                    "hit_rate": held.hit_rate,
                    "bytes_a_forward": int(held.loads.sum()) * size / forwards,
                    "bytes_waited_for": int(held.loads.sum()) * size / forwards,
                    "loss_bound": errors[kind],
                }
            )
        for spelling in PLACEMENTS:
            placement = Coarse.parse("", spelling).placement
            split = Split.of(
                room, placement.share, experts=MINI.experts, fine=sizes["int8"],
                coarse=sizes["int4"],
            )  # fmt: skip
            books = mix(memory, chosen.used, split, placement)
            lines.append(
                {
                    "policy": policy,
                    "memory": spelling,
                    "slots": [split.fine, split.coarse],
                    **summed(books, sizes, errors, forwards),
                }
            )
    for line in lines:
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    told = {"law": to_json(law), "blocks": BLOCKS, "share": share, "expert_bytes": sizes}
    return {**told, "error": errors, "lines": lines}


def summed(
    books: Sequence[Mixture],
    sizes: Mapping[str, int],
    errors: Mapping[str, float],
    forwards: int,
) -> dict[str, object]:
    """A forward waits for what comes at once and coarse; what comes later comes meanwhile."""
    came = {name: sum(book.came[name] for book in books) for name in CAME}
    moved = {
        name: count * sizes["int4" if name == "coarse" else "int8"] / forwards
        for name, count in came.items()
    }
    votes = sum(book.votes_fine for book in books) / sum(book.forwards for book in books)
    return {
        "hit_rate": sum(book.hits for book in books) / sum(book.used for book in books),
        "bytes_a_forward": sum(moved.values()),
        "bytes_waited_for": moved["at once"] + moved["coarse"],
        "votes_fine": votes,
        "loss_bound": errors["int8"] * votes + errors["int4"] * (1 - votes),
    }


def gaussian_error(kind: str) -> float:
    """Of one expert of this shape."""
    draw = torch.Generator().manual_seed(0)
    gate_up = torch.randn(1, 2 * WIDTH, HIDDEN, generator=draw) * HIDDEN**-0.5
    down = torch.randn(1, HIDDEN, WIDTH, generator=draw) * WIDTH**-0.5
    nobody = torch.zeros(1, dtype=torch.int64)
    few = Slab(quantise(gate_up, FORMATS[kind]), quantise(down, FORMATS[kind]), nobody)
    return distance(Slab(gate_up, down, nobody), few)
