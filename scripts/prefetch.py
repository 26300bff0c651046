"""Measures what bringing experts before they are asked for would save.

Three parts. Guesses: traces are replayed over 35 % of the experts, of which some slots hold who is
guessed to come next: by votes of the layer's last forwards, by who was used together with the
experts of the layer before, by that layer's input put through the next layer's own gate, or by who
really comes, which nobody can beat. Guesses come while the link would stand still, so that they
delay nobody: what they save is the most that there is. Two machines, one with experts on a disk
behind a CPU, one with them in its memory behind a small GPU; every expert weighs what
LLaDA2.0-mini's do in int8.

A warm start: slots filled with those who had most votes on other problems, and how many fewer had
to come after so many forwards. And memory of the host between slots and a disk: what share of the
slots' misses it finds, by who was fetched last and by who was fetched most.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import coterie
from coterie import ops
from coterie.engine.engine import Engine
from coterie.engine.watch import Watched, watch
from coterie.evals.task import Wish
from coterie.evals.tasks import open_tasks
from coterie.experts.eviction import Lfu, Lru
from coterie.experts.host import Host
from coterie.experts.slots import Slots
from coterie.experts.tiers import InMemory
from coterie.keys import from_json, to_json
from coterie.model.moe import MoE
from coterie.planning.booking import Cache, Chosen, Memory, Play, asks_residents, book, choose
from coterie.planning.machine import Machine
from coterie.planning.prefetch import Guess, Nobody, Numbers, Together, Told, Voted, play_ahead
from coterie.planning.recording import Recording, about, bias_of
from coterie.planning.synthetic import MINI, Law, synthetic
from coterie.planning.trace import Trace, Writer, read
from coterie.problems import TASKS
from coterie.results import record, write_record
from coterie.routing import parse_policy
from coterie.routing.select import choose as choose_own
from coterie.values import Demand, Routing

SEED = 9201
SHARE = 0.35
SIZE = dict(MINI.expert_bytes)["int8"]
DRAWN = Path("results/replay-drawn-mini.json")
MACHINES = {
    "CPU, experts on a disk": Machine(link=4e9, memory=31e9, rest=25e-3),
    "8 GB GPU, experts in host memory": Machine(link=25e9, memory=450e9, rest=10e-3),
}
POLICIES = {
    "embedded": ("vanilla", "des-vote:beta=0.3", "resident-vote:beta=0.3"),
    "drawn": ("vanilla", "des-vote:beta=0.1", "resident-vote:beta=0.1"),
}
SHELVES = (2, 8)
AFTER = (1, 8, 64, 512)  # forwards
HOSTED = (0.35, 0.6)


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    law = from_json(Law, json.loads(DRAWN.read_text())["facts"]["as read off"]["law"])
    drawn = synthetic(MINI, law, blocks=asked.blocks, seed=7)
    trace, gates = looked_ahead(coterie.load(), asked.items, asked.seed)
    facts = {
        "expert_bytes": SIZE,
        "machines": {name: to_json(one) for name, one in MACHINES.items()},
        "embedded": told(trace, POLICIES["embedded"], gates),
        "drawn": told(drawn, POLICIES["drawn"], None),
        "warm start": {"embedded": warm(trace), "drawn": warm(drawn)},
        "host memory": {"embedded": hosted(trace), "drawn": hosted(drawn)},
    }
    content = record("Prefetch replayed", ["scripts/prefetch", *words], [], facts=facts)
    print(write_record(asked.out, content))
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/prefetch", description=__doc__)
    parser.add_argument("--items", type=int, default=10, help="problems of each of the four tasks")
    parser.add_argument("--blocks", type=int, default=16, help="that are drawn")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def looked_ahead(engine: Engine, items: int, seed: int) -> tuple[Trace, Numbers]:
    """The model in the package at work in eight steps a block; and [F, L, E], of each layer the
    votes that its gate casts when it is shown the input of the layer before."""
    tasks = open_tasks(list(TASKS), Wish(engine.model.family.name, count=items, seed=seed))
    generation = engine.generation.but(unmask="fixed:steps=8")
    prompts = [task.prompt(item) for task in tasks for item in task.items()]
    said = about(engine, policy="vanilla", generation=generation, prompts={}, made={})
    votes: list[Numbers] = []
    networks = [layer.feed_forward for layer in engine.model.transformer.layers]
    gates = [one for one in networks if isinstance(one, MoE)]

    def ahead(watched: Watched) -> None:
        votes.append(votes_ahead(watched, gates))

    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with Writer(path, said, bias_of(engine.model)) as writer:
            keep = Recording(writer).see
            see = both(ahead, keep)
            watch(engine, prompts, see, rows=1, every=True, unmask=generation.unmask)
        trace = read(path)
    layers = len(trace.about.layers)
    table = np.stack(votes).reshape(len(trace.forwards), layers, -1)
    # What a layer's input says is of the next one; nobody has told of the first.
    return trace, np.concatenate([np.zeros_like(table[:, :1]), table[:, :-1]], axis=1)


def both(*see: Callable[[Watched], None]) -> Callable[[Watched], None]:
    def seen(watched: Watched) -> None:
        for one in see:
            one(watched)

    return seen


def votes_ahead(watched: Watched, gates: Sequence[MoE]) -> Numbers:
    """[E]: what the gate of the next layer makes of this one's input; nothing after the last."""
    at = [gate.layer for gate in gates].index(watched.layer)
    if at + 1 == len(gates):
        return np.zeros(watched.scores.router.experts)
    gate = gates[at + 1]
    logits = ops.linear(watched.x, gate.gate, dtype=watched.scores.logits.dtype)
    scores = replace(watched.scores, logits=logits, bias=gate.bias, own=None)
    own = choose_own(scores, None).flatten(0, 1)
    demand = Demand(
        watched.routing.used, Routing(own, own.float(), watched.routing.used, own), scores
    )
    found = demand.votes
    return np.zeros(0) if found is None else found.numpy()


def told(trace: Trace, policies: Sequence[str], gates: Numbers | None) -> dict[str, object]:
    """Every policy and guess on both machines."""
    memory, slots = Memory.of(trace), int(SHARE * trace.about.experts)
    found: list[dict[str, object]] = []
    for policy in policies:
        play = Play(parse_policy(policy), commits=policy != "vanilla")
        chosen = None if asks_residents(play) else choose(memory, play)
        for name, machine in MACHINES.items():
            base = None
            for guess, shelf in cases(chosen, gates):
                made = play_ahead(
                    memory,
                    play,
                    chosen,
                    guess(),
                    slots=slots,
                    shelf=shelf,
                    machine=machine,
                    size=SIZE,
                )
                each = {
                    "policy": policy,
                    "machine": name,
                    "guess": guess.__name__,
                    "shelf": shelf,
                    "experts": float(made.used.mean()),
                    "waited_for": float(made.waited.mean()),
                    "early": float(made.early.mean()),
                    "useful": float(made.useful.sum() / max(1, made.early.sum())),
                    "moved": made.moved,
                    "ms": 1e3 * made.seconds / int(memory.decoding.sum()),
                }
                base = base or each
                each["moved_against_none"] = made.moved / base["moved"] - 1
                each["ms_against_none"] = each["ms"] / base["ms"] - 1
                found.append(each)
                print(
                    f"{policy:24} {name[:6]} {each['guess']:12} {shelf:2}"
                    f" waits {each['waited_for']:6.2f} early {each['early']:5.2f}"
                    f" useful {each['useful']:5.1%} moved {each['moved_against_none']:+7.1%}"
                    f" ms {each['ms_against_none']:+6.1%}",
                    flush=True,
                )
    return {"forwards": len(trace.forwards), "slots": slots, "cases": found}


def warm(trace: Trace) -> dict[str, object]:
    """The later half of a trace under vanilla, its slots empty or filled with the most voted of the
    earlier half: experts that came, of all layers, by the end of so many forwards."""
    half = len(trace.forwards) // 2
    seen, rest = (
        Memory.of(replace(trace, forwards=part))
        for part in (trace.forwards[:half], trace.forwards[half:])
    )
    slots, play = int(SHARE * trace.about.experts), Play(parse_policy("vanilla"))
    chosen = choose(rest, play)
    cold, filled = (
        book(rest, play, chosen, Cache(Lru(), slots, votes)).loads.sum(-1).cumsum()
        for votes in (None, seen.mean_votes)
    )
    return {
        "filled": int(slots * len(trace.about.layers)),
        "came": {
            str(many): {"cold": int(cold[many - 1]), "warm": int(filled[many - 1])}
            for many in AFTER
            if many <= len(cold)
        },
    }


def hosted(trace: Trace) -> dict[str, object]:
    """Of the experts that slots for 35 % miss under vanilla, the share found in memory of the host
    that holds so large a share of all, whatever their layer."""
    memory, play = Memory.of(trace), Play(parse_policy("vanilla"))
    chosen, about = choose(memory, play), trace.about
    books = [Slots(about.experts, int(SHARE * about.experts), Lru()) for _ in about.layers]
    misses = [
        (layer, expert)
        for used in chosen.used
        for at, layer in enumerate(about.layers)
        for wave in books[at].serve(used[at])
        for expert, _ in wave.loads
    ]
    found: dict[str, object] = {"misses": len(misses)}
    none = {layer: torch.zeros(about.experts, 1, dtype=torch.uint8) for layer in about.layers}
    for share in HOSTED:
        for name, rule in (("lru", Lru()), ("lfu", Lfu())):
            many = int(share * about.experts * len(about.layers))
            held = torch.zeros(many, 1, dtype=torch.uint8)
            host = Host(InMemory(none), held, about.layers, about.experts, rule)
            for layer, expert in misses:
                host.fetch(layer, expert, torch.zeros(1, dtype=torch.uint8))
            found[f"{name}, {share:.0%} of all"] = host.hits / len(misses)
    return found


def cases(chosen: Chosen | None, gates: Numbers | None) -> list[tuple[Callable[[], Guess], int]]:
    """Guesses with the slots they are given; first none, which the others are compared with."""

    def nobody() -> Guess:
        return Nobody()

    def last_votes() -> Guess:
        return Voted(0.0)

    def late_votes() -> Guess:
        return Voted(0.8)

    def together() -> Guess:
        return Together()

    def next_gate() -> Guess:
        assert gates is not None
        return Told(gates)

    def truth() -> Guess:
        assert chosen is not None
        return Told(chosen.used.astype(np.float64))

    made = [last_votes, late_votes, together]
    made += [] if gates is None else [next_gate]
    made += [] if chosen is None else [truth]
    return [(nobody, 0)] + [(guess, shelf) for guess in made for shelf in SHELVES]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
