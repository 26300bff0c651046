"""Times experts that do not all fit into memory, on a CPU with a disk behind it.

    scripts/loading FOLDER --make --kinds int8-packed --layers 20 --vocabulary 157184
    scripts/offload FOLDER/int8-packed

LLaDA2.0-mini's shape in int8, of random weights, and routing that is drawn: its law is that of
"Replay drawn mini", read off the model in the package. Three parts, each with a record of its own.

layers   the experts of a few layers alone, served from the disk and computed, policies and sizes of
         memory taking turns block by block; all experts in memory, and a store whose slots hold
         all, beside each other.
whole    the whole model writes text, 35 % of its experts in memory: attention, router, shared
         experts, logits and the loop of decoding included. It routes as the drawn trace does, for
         gates of random weights are not skewed.
resident the same with every expert in memory, where that has room for them.

The clock that replays foretell learns its rates from some of the runs, and the others, which took
turns with these, are held against it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from coterie.engine.load import Model, load_model
from coterie.engine.offloaded import blobs
from coterie.experts.capacity import Capacity
from coterie.experts.couriers import Readers
from coterie.experts.eviction import Lru
from coterie.experts.offload import Offloaded
from coterie.experts.store import Resident
from coterie.experts.tiers import Blobs, OnDisk
from coterie.families import Config, recognise
from coterie.families.names import is_stacked, weight_map
from coterie.model.checkpoint import Checkpoint
from coterie.model.moe import MoE
from coterie.model.spec import ModelSpec
from coterie.ops.cpu.kernels import memory
from coterie.ops.panels import in_panels
from coterie.planning.booking import Booked, Cache, Memory, Play, asks_residents, book, choose
from coterie.planning.following import Following, Ran, run, with_commits
from coterie.planning.judging import Judgement, judge, together
from coterie.planning.learning import Timed
from coterie.planning.serving import Served, serve_trace
from coterie.planning.synthetic import MINI, Law, Shape, synthetic
from coterie.planning.trace import Trace
from coterie.results import Measure, record, write_record
from coterie.routing import parse_policy
from coterie.values import Demand, Slab, Store

SHARE = "35%"
DRAWN = Path("results/replay-drawn-mini.json")
ALL, AMPLE = "all in memory", "slots for all"
Arm = tuple[Play, str]
"""A policy, and the experts that memory holds."""

VANILLA, VOTE, RESIDENT = "vanilla", "des-vote:beta=0.1", "resident-vote:beta=0.1"
PARTS = ("layers", "whole", "resident")


def play(policy: str, drift: float | None = None, *, commits: bool = True) -> Play:
    return Play(parse_policy(policy), drift, commits)


POLICIES = (play(VANILLA), play(VOTE), play(RESIDENT), play(RESIDENT, 0.05))
TEACHERS: tuple[Arm, ...] = tuple(
    (one, share) for share in ("25%", "50%") for one in (POLICIES[0], POLICIES[1])
)
LAYER_ARMS: tuple[Arm, ...] = (
    *TEACHERS,
    *((one, SHARE) for one in POLICIES),
    (play("des-vote:beta=0.15"), SHARE),
    (POLICIES[2], "25%"),
    (POLICIES[2], "50%"),
)
WHOLE_TEACHERS: tuple[Arm, ...] = tuple((one, "25%") for one in POLICIES[:3])
WHOLE_ARMS: tuple[Arm, ...] = (
    *((one, SHARE) for one in POLICIES),
    (play(RESIDENT, commits=False), SHARE),
)


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    torch.set_num_threads(asked.threads)
    told = [Path(word).name if word == str(asked.folder) else word for word in words]
    bench = Bench(asked.folder, spec_of(asked.folder), law_of(asked.law))
    for part in asked.parts:
        title, measures, facts = {"layers": layers, "whole": whole, "resident": resident}[part](
            bench, asked
        )
        content = record(title, ["scripts/offload", *told], measures, facts=facts)
        print(write_record(asked.out, content), flush=True)
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/offload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a packed checkpoint, with its manifest")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--layers", type=int, default=2, help="of the part that has experts alone")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of a run")
    parser.add_argument("--rounds", type=int, default=2, help="turns of all runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--law", type=Path, default=DRAWN, help="the record whose law is drawn by")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def spec_of(folder: Path) -> ModelSpec:
    config = Config.of(folder / "config.json")
    return recognise(config).read(config)


def law_of(path: Path) -> Law:
    return Law(**json.loads(path.read_text())["facts"]["as read off"]["law"])


@dataclass(frozen=True)
class Bench:
    """The model, and the law by which its routing is drawn."""

    folder: Path
    spec: ModelSpec
    law: Law

    @property
    def size(self) -> int:
        return self.spec.expert_stride

    def drawn(self, layers: int, blocks: int) -> Trace:
        router = self.spec.router
        shape = Shape(layers, router.experts, router.k, steps=MINI.steps)
        return synthetic(shape, self.law, blocks=blocks, seed=7)

    def slots(self, share: str) -> int:
        layers, experts = len(self.spec.moe_layers), self.spec.router.experts
        return Capacity.parse(share).slots(layers=layers, experts=experts, size=self.size)

    def foretold(self, trace: Trace, arm: Arm) -> Booked:
        """What a replay says that is used and loaded."""
        memory, (one, share) = Memory.of(trace), arm
        chosen = None if asks_residents(one) else choose(memory, one)
        return book(memory, one, chosen, Cache(Lru(), self.slots(share)))

    def about(self, trace: Trace, asked: argparse.Namespace) -> dict[str, object]:
        router = self.spec.router
        return {
            "layers": len(trace.about.layers),
            "experts": router.experts,
            "expert_bytes": self.size,
            "forwards": len(trace.forwards),
            "steps_a_block": MINI.steps,
            "threads": asked.threads,
            "rounds": asked.rounds,
            "drawn": dict(trace.about.made),
        }


def named(arm: Arm) -> str:
    one, share = arm
    commits = "" if one.commits else ", commits vanilla"
    return f"{one}{commits}, {share} in memory"


# --- layers ---------------------------------------------------------------------------------------


def layers(bench: Bench, asked: argparse.Namespace) -> tuple[str, list[Measure], dict[str, object]]:
    trace = bench.drawn(asked.layers, asked.blocks)
    alone = Layers(bench, trace, on_disk(bench.folder, asked.layers))
    ratios, found = alone.with_all(2 * asked.rounds), alone.with_few()
    runs = {named(arm): timed_layers(served) for arm, served in found.items()}
    judged = judge(runs, [named(arm) for arm in TEACHERS], bench.size)
    measures = ratios + [
        Measure(f"{named(arm)}: a layer", "ms", tuple(1e3 * part.seconds.mean() for part in parts))
        for arm, parts in found.items()
    ]
    tell(judged)
    counted = {named(arm): summary(bench, trace, arm, found[arm]) for arm in found}
    return (
        "Offload on a CPU",
        measures,
        {**bench.about(trace, asked), "foretelling": judged.document(), "runs": counted},
    )


def on_disk(folder: Path, layers: int) -> OnDisk:
    """The experts of the first layers that have some, called 1, 2 ..; let go from the system's
    cache of files."""
    checkpoint = Checkpoint.of(folder)
    config = Config.of(folder / "config.json")
    family = recognise(config)
    names, spec = family.names, family.read(config)
    places = weight_map(names, spec, stacked=is_stacked(checkpoint.tensors))
    found: dict[int, Blobs] = {}
    for number, (_, one) in enumerate(sorted(blobs(checkpoint, places).items())[:layers], 1):
        descriptor = os.open(one.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        found[number] = one
    return OnDisk(found)


@dataclass(frozen=True)
class Layers:
    """Experts of a few layers alone."""

    bench: Bench
    trace: Trace
    disk: OnDisk

    @property
    def x(self) -> Tensor:
        """What goes into every layer, [N, H]."""
        draw = torch.Generator().manual_seed(3)
        return torch.randn(MINI.tokens, self.bench.spec.hidden, generator=draw).bfloat16()

    def with_few(self) -> dict[Arm, list[Served]]:
        """Every arm with slots of its own, empty at first: block by block, each time in another
        order, so that what else the machine does falls on all of them alike."""
        stores = {arm: self.store(self.bench.slots(arm[1])) for arm in LAYER_ARMS}
        found: dict[Arm, list[Served]] = {arm: [] for arm in LAYER_ARMS}
        draw, x = Random(0), self.x
        for few in self.blocks():
            order = list(LAYER_ARMS)
            draw.shuffle(order)
            for arm in order:
                found[arm].append(serve_trace(few, arm[0], stores[arm], x))
        return found

    def with_all(self, turns: int) -> list[Measure]:
        """What a store that fetches costs where its slots are full and hold all, against none: over
        the same bytes, for where these lie in memory can change more than what is compared."""
        ample, slabs = self.store(self.bench.spec.router.experts), {}
        for layer in self.trace.about.layers:
            everybody = torch.ones(self.bench.spec.router.experts, dtype=torch.bool)
            list(ample.serve(layer, Demand(everybody)))
            (slabs[layer],) = ample.serve(layer, Demand(everybody))
        stores: dict[str, Store] = {ALL: Resident(slabs), AMPLE: ample}
        found: dict[str, list[float]] = {}
        for turn in range(turns + 1):  # the first forwards of a process are slow
            for one in POLICIES[:2]:
                taken = dict.fromkeys(stores, 0.0)
                for block, few in enumerate(self.blocks()):
                    for name in sorted(stores, reverse=block % 2 == 1):
                        taken[name] += serve_trace(few, one, stores[name], self.x).seconds.sum()
                if turn:
                    found.setdefault(str(one), []).append(taken[AMPLE] / taken[ALL])
        return [
            Measure(f"{name}: {AMPLE} against {ALL}", "x", tuple(ratios))
            for name, ratios in found.items()
        ]

    def blocks(self) -> Iterator[Trace]:
        forwards = self.trace.forwards
        for first in range(0, len(forwards), MINI.steps):
            yield replace(self.trace, forwards=forwards[first : first + MINI.steps])

    def store(self, slots: int) -> Offloaded:
        spec = self.bench.spec

        def shown(held: Tensor, slot_of: Tensor) -> Slab:
            sizes = {"hidden": spec.hidden, "width": spec.expert_width}
            return in_panels(held, spec.panel_kind, slot_of, **sizes)

        experts, size = spec.router.experts, self.bench.size
        return Offloaded(Readers(self.disk), shown, memory, experts, size, slots, Lru())


def timed_layers(parts: Sequence[Served]) -> Timed:
    """Every layer as a forward of its own."""
    return together(
        [
            Timed(part.used.reshape(-1, 1), part.loads.reshape(-1, 1), part.seconds.reshape(-1))
            for part in parts
        ]
    )


def summary(bench: Bench, trace: Trace, arm: Arm, parts: Sequence[Served]) -> dict[str, object]:
    used, loads, seconds = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("used", "loads", "seconds")
    )
    foretold = bench.foretold(trace, arm)
    return {
        "experts": float(used.mean()),
        "loads": float(loads.mean()),
        "hit_rate": 1 - float(loads.sum() / used.sum()),
        "bytes_a_layer": float(loads.mean()) * bench.size,
        "loads_as_replayed": bool((foretold.loads == loads).all()),
        "ms_a_layer": 1e3 * float(seconds.mean()),
        "stall_ms_a_layer": 1e3 * sum(part.waited for part in parts) / seconds.size,
    }


# --- the whole model ------------------------------------------------------------------------------


def whole(bench: Bench, asked: argparse.Namespace) -> tuple[str, list[Measure], dict[str, object]]:
    """Teachers write two blocks, the others all."""
    model, stores = opened(bench, {share for _, share in (*WHOLE_TEACHERS, *WHOLE_ARMS)})
    trace = with_commits(bench.drawn(len(bench.spec.moe_layers), asked.blocks))
    brief = with_commits(bench.drawn(len(bench.spec.moe_layers), min(2, asked.blocks)))
    traces = {
        arm: brief if arm in WHOLE_TEACHERS else trace for arm in (*WHOLE_TEACHERS, *WHOLE_ARMS)
    }
    found = in_turns(model, lambda arm: stores[arm[1]], traces, asked.rounds)
    runs, replays = {}, {}
    for arm, ran in found.items():
        replays[arm] = bench.foretold(traces[arm], arm)
        counts = replays[arm].used, replays[arm].loads
        runs[named(arm)] = together([Timed(*counts, one.seconds) for one in ran])
    judged = judge(runs, [named(arm) for arm in WHOLE_TEACHERS], bench.size)
    tell(judged)
    vanilla = found[WHOLE_ARMS[0]]
    told = {
        named(arm): {
            **written(bench, ran, vanilla if arm in WHOLE_ARMS else found[WHOLE_TEACHERS[0]]),
            "loads_as_replayed": all(
                (one.loads == replays[arm].loads.sum(-1)).all() for one in ran
            ),
        }
        for arm, ran in found.items()
    }
    facts = {**bench.about(trace, asked), "foretelling": judged.document(), "runs": told}
    return "Offload whole model", measured(found), facts


def resident(
    bench: Bench, asked: argparse.Namespace
) -> tuple[str, list[Measure], dict[str, object]]:
    """Experts mapped, each in the system's cache of files."""
    model = load_model(bench.folder, dtype="bf16", device="cpu")
    store = store_of(model)
    trace = with_commits(bench.drawn(len(bench.spec.moe_layers), asked.blocks))
    arms = [(one, "100%") for one in POLICIES[:2]]
    found = in_turns(model, lambda arm: store, dict.fromkeys(arms, trace), asked.rounds)
    told = {named(arm): written(bench, ran, found[arms[0]]) for arm, ran in found.items()}
    facts = {**bench.about(trace, asked), "runs": told}
    return "Offload whole model resident", measured(found), facts


def opened(bench: Bench, shares: set[str]) -> tuple[Model, dict[str, Offloaded]]:
    """One model, and a store for each share of the experts."""
    models = {
        share: load_model(bench.folder, dtype="bf16", device="cpu", expert_memory=share)
        for share in sorted(shares)
    }
    stores = {share: model.offloaded for share, model in models.items()}
    return models[SHARE], {share: one for share, one in stores.items() if one is not None}


def store_of(model: Model) -> Store:
    networks = (layer.feed_forward for layer in model.transformer.layers)
    return next(one.store for one in networks if isinstance(one, MoE))


def in_turns(
    model: Model,
    store: Callable[[Arm], Store],
    traces: Mapping[Arm, Trace],
    rounds: int,
) -> dict[Arm, list[Ran]]:
    """Every arm once a round, in an order drawn anew, its slots empty at first. Before all of them
    a block under vanilla through every store: first forwards, and slots never touched, are slow."""
    follows = {id(trace): Following(trace) for trace in traces.values()}
    found: dict[Arm, list[Ran]] = {arm: [] for arm in traces}
    for arm in {arm[1]: arm for arm in traces}.values():
        short = replace(traces[arm], forwards=traces[arm].forwards[: MINI.steps])
        run(model, Following(short), POLICIES[0], store(arm))
    draw = Random(0)
    for _ in range(rounds):
        order = list(traces)
        draw.shuffle(order)
        for arm in order:
            kept = store(arm)
            if isinstance(kept, Offloaded):
                kept.empty()
            ran = run(model, follows[id(traces[arm])], arm[0], kept)
            found[arm].append(ran)
            print(
                f"{named(arm)}: {1e3 * ran.seconds.sum() / ran.decoding:.0f} ms a forward, "
                f"{ran.tokens_per_second:.2f} tokens/s",
                flush=True,
            )
    return found


def written(bench: Bench, ran: Sequence[Ran], vanilla: Sequence[Ran]) -> dict[str, object]:
    """Of all turns together; forwards that commit are laid on those that decode."""
    decoding, moved = sum(one.decoding for one in ran), bytes_of(bench, ran)
    seconds = sum(float(one.seconds.sum()) for one in ran)
    usual = bytes_of(bench, vanilla)
    used = sum(int(one.used.sum()) for one in ran)
    first = {kind: one_kind(ran, kind) for kind in ("decode", "commit")}
    passes = sum(len(one.kinds) for one in ran)
    return {
        "blocks": ran[0].kinds.count("commit") + 1,
        "forwards": {kind: ran[0].kinds.count(kind) for kind in first},
        "experts_of_a_layer": used / passes / len(bench.spec.moe_layers),
        "bytes_moved_a_forward": moved / decoding,
        "bytes_moved_against_vanilla": moved / usual if usual else None,
        "hit_rate": 1 - moved / bench.size / used if used else None,
        "ms_a_forward": 1e3 * seconds / decoding,
        "median_ms": first,
        "stall_ms_a_forward": 1e3 * sum(float(one.stalls.sum()) for one in ran) / decoding,
        "tokens_per_second": sum(one.tokens for one in ran) / seconds,
        "tokens_per_second_against_vanilla": (sum(one.tokens for one in ran) / seconds)
        / (sum(one.tokens for one in vanilla) / sum(float(v.seconds.sum()) for v in vanilla)),
    }


def one_kind(ran: Sequence[Ran], kind: str) -> float | None:
    """The median of its forwards, ms."""
    taken = [
        second
        for one in ran
        for second, what in zip(one.seconds, one.kinds, strict=True)
        if what == kind
    ]
    return 1e3 * float(np.median(taken)) if taken else None


def bytes_of(bench: Bench, ran: Sequence[Ran]) -> int:
    return bench.size * sum(int(one.loads.sum()) for one in ran)


def measured(found: Mapping[Arm, Sequence[Ran]]) -> list[Measure]:
    speeds = [
        Measure(f"{named(arm)}: written", "tokens/s", tuple(one.tokens_per_second for one in ran))
        for arm, ran in found.items()
    ]
    return speeds + [
        Measure(
            f"{named(arm)}: a forward",
            "ms",
            tuple(1e3 * float(one.seconds.sum()) / one.decoding for one in ran),
        )
        for arm, ran in found.items()
    ]


def tell(judged: Judgement) -> None:
    for one in judged.runs:
        said = "learnt from" if one.taught else "foretold"
        print(f"{one.name}: {1e3 * one.seconds:.2f} ms, {said}, off by {one.off_by:+.1%}")
    print(f"worst {max(judged.held_out):.1%} of those not learnt from", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
