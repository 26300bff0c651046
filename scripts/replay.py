"""Measures what caching can save: real traces and drawn ones, replayed and held against real runs.

Three records. "Replay drawn mini": routing drawn in LLaDA2.0-mini's sizes, its overlap from step
to step taken from the model in the package. "Replay embedded": that model's own traces over the
grid of policy x capacity x precision. "Replay against runs": the same policies answering problems
under an imagined memory, accuracy paired with vanilla's, and how far the replay was off. The
policies' options were chosen on problems of seed 101; these are others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import coterie
from coterie.engine.engine import Engine
from coterie.engine.load import Model
from coterie.evals.report import lines
from coterie.evals.run import Arm, run
from coterie.evals.sheet import Sheet
from coterie.evals.stats import holm, paired
from coterie.evals.task import Task, Wish
from coterie.evals.tasks import open_tasks
from coterie.experts.imagined import Imagined
from coterie.experts.traffic import Traffic
from coterie.model.moe import MoE
from coterie.planning.booking import Play
from coterie.planning.machine import Capacity, Machine, rate_of
from coterie.planning.overlap import Overlap
from coterie.planning.recording import about, bias_of, record_trace
from coterie.planning.replay import (
    Grid,
    Replay,
    decoding_only,
    replay,
    slots_of,
    steps_per_block,
)
from coterie.planning.synthetic import (
    MINI,
    Look,
    calibrated,
    carried,
    looked,
    synthetic,
)
from coterie.planning.trace import KINDS, Trace, Writer, read
from coterie.problems import TASKS
from coterie.results import record, write_record
from coterie.routing import parse_policy

SEED = 9101
SHARE = "35%"
SHARES = ("12%", "25%", SHARE, "50%", "100%")
LINKS = {"25GB/s": Machine(rate_of("25GB/s", "link"))}
UNIQUE = 84.0  # of 256 experts, what a forward of 32 tokens uses of LLaDA2.0-mini (DES, Table 1)
DRAWN_BLOCKS = 16
DRAWN = (
    "vanilla",
    "des-vote:beta=0.1",
    "resident-vote:beta=0.1",
    "resident-vote:beta=0.15",
)
RULES = (
    *("des-vote:beta=0.3", "resident-vote:beta=0.3", "des-seq:k=3"),
    *("proportional-vote:beta=0.3", "proportional-vote:beta=0.3,lam=3,eps=0.2"),
    *("priced-vote:price=0.022", "priced-vote:price=0.022,lam=1,eps=0.1"),
    *("priced-vote:price=0.04", "priced-vote:price=0.04,lam=1,eps=0.1"),
    "priced-vote:price=0.04,lam=3,eps=0.1",
)
EXAMINED = tuple(rule for rule in RULES if rule.startswith("priced-vote"))


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    command = ["scripts/replay", *words]
    engine = coterie.load()
    wish = Wish(engine.model.family.name, count=asked.items, seed=asked.seed)
    tasks = open_tasks(list(TASKS), wish)
    traces = {steps: traced(engine, tasks, asked.prompts, steps) for steps in (False, True)}
    if "drawn" in asked.parts:
        keep(asked.out, "Replay drawn mini", command, drawn(looked(traces[True])))
    if "embedded" in asked.parts:
        keep(asked.out, "Replay embedded", command, embedded(traces[False], traces[True]))
    if "runs" in asked.parts:
        keep(
            asked.out,
            "Replay against runs",
            command,
            held(engine, tasks, traces[False]),
        )
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/replay", description=__doc__)
    parser.add_argument("--items", type=int, default=250, help="problems of each of the four tasks")
    parser.add_argument("--prompts", type=int, default=20, help="of these, how many are traced")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--parts", nargs="*", default=["drawn", "embedded", "runs"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def keep(out: Path, title: str, command: Sequence[str], facts: dict[str, object]) -> None:
    print(write_record(out, record(title, command, [], facts=facts)), flush=True)


def traced(engine: Engine, tasks: Sequence[Task], count: int, slow: bool) -> Trace:
    """The first problems of each task, one row at a time; ``slow``: in eight steps a block, as a
    large model decodes."""
    generation = engine.generation.but(**({"unmask": "fixed:steps=8"} if slow else {}))
    prompts = [task.prompt(item) for task in tasks for item in task.items()[:count]]
    said = about(engine, policy="vanilla", generation=generation, prompts={}, made={})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with Writer(path, said, bias_of(engine.model)) as writer:
            record_trace(engine, prompts, writer, unmask=generation.unmask)
        return read(path)


def drawn(seen: Look) -> dict[str, object]:
    """LLaDA2.0-mini's sizes at 35 %; then with tokens that remember more and less."""
    wanted = carried(seen, 128, UNIQUE, MINI.experts)
    told: dict[str, object] = {
        "read_off": vars(seen),
        "blocks": DRAWN_BLOCKS,
        "steps": MINI.steps,
    }
    for name, look in variants(wanted).items():
        law = calibrated(MINI, look)
        trace = synthetic(MINI, law, blocks=DRAWN_BLOCKS, seed=7)
        plays = [Play(parse_policy(policy)) for policy in DRAWN]
        plays.append(Play(parse_policy("resident-vote:beta=0.1"), drift=0.05))
        caches = ["lru", "lfu", "votes"] if name == "as read off" else ["lru"]
        shares = SHARES if name == "as read off" else (SHARE,)
        kept = {name: size for name, size in MINI.expert_bytes if name != "int4"}
        made = replay(trace, grid(plays, caches, shares, kept))
        found = {"wanted": vars(look), "law": vars(law), "came_to": vars(looked(trace))}
        told[name] = {**found, **document(made)}
        tell(f"drawn, {name}", made)
    return told


def variants(wanted: Look) -> dict[str, Look]:
    """The overlap from step to step as it was read off, halfway to chance, and halfway to all."""
    chance = wanted.unique / MINI.experts
    return {
        "as read off": wanted,
        "steps less alike": replace(wanted, step_overlap=(wanted.step_overlap + chance) / 2),
        "steps more alike": replace(wanted, step_overlap=(wanted.step_overlap + 1) / 2),
        "blocks more alike": replace(wanted, block_overlap=(wanted.block_overlap + 1) / 2),
    }


def embedded(quick: Trace, slow: Trace) -> dict[str, object]:
    """The grid over the model's own traces: with commits routed by the policy, without, and of
    decoding forwards alone; and in eight steps a block."""
    told: dict[str, object] = {}
    for name, trace, commits in (
        ("commit=policy", quick, True),
        ("commit=vanilla", quick, False),
        ("decoding only", decoding_only(quick), False),
        ("eight steps a block, commit=policy", slow, True),
    ):
        plays = [Play(parse_policy("vanilla"))]
        plays += [Play(parse_policy(rule), commits=commits) for rule in RULES]
        plays += [Play(parse_policy(RULES[3]), 0.05, commits)] if trace is slow else []
        whole = name == "commit=policy"
        sizes = dict(trace.about.expert_bytes)
        sizes = sizes if whole else {"bf16": sizes["bf16"]}
        made = replay(trace, grid(plays, ["lru"], SHARES if whole else (SHARE,), sizes))
        kinds = {kind: sum(one.kind == kind for one in trace.forwards) for kind in KINDS}
        told[name] = {"forwards": kinds, "steps_per_block": steps_per_block(trace)}
        told[name] = {**told[name], **document(made)}  # type: ignore[dict-item]
        tell(name, made)
    return told


def held(engine: Engine, tasks: Sequence[Task], trace: Trace) -> dict[str, object]:
    """Every policy asked each problem under an imagined memory of 35 %, prompts and commits in."""
    plays = [Play(parse_policy("vanilla"))]
    plays += [Play(parse_policy(rule), commits=True) for rule in EXAMINED]
    asked = grid(plays, ["lru"], (SHARE,), {"bf16": trace.about.expert_bytes["bf16"]})
    foretold = {str(p.case.play): p for p in replay(trace, asked).points}
    slots = slots_of(trace, asked, asked.cases()[0])
    answered = [answer(engine, tasks, rule, slots) for rule in ("vanilla", *EXAMINED)]
    vanilla, *others = answered
    duels = [paired(vanilla.sheet.right(), one.sheet.right()) for one in others]
    raised = iter(holm([duel.p for duel in duels]))
    told = []
    report = lines([one.sheet for one in answered], [task.name for task in tasks])
    for one, line in zip(answered, report, strict=True):
        right = one.sheet.right()
        saved = 1 - one.traffic.moved / vanilla.traffic.moved
        point = foretold[one.rule].traffic.saved
        each = {
            "rule": one.rule,
            "used": one.traffic.used,
            "moved": one.traffic.moved,
            "saved": saved,
        }
        told.append({**each, "saved_foretold": point, "exam": line.document()})
        print(f"{one.rule:42} {sum(right) / len(right):.1%} saved {saved:.1%} foretold {point:.1%}")
    return {
        "items": len(vanilla.sheet.answers),
        "slots": slots,
        "policies": told,
        "duels": [
            {"rule": one.rule, **vars(duel), "p_holm": next(raised)}
            for one, duel in zip(others, duels, strict=True)
        ],
    }


@dataclass(frozen=True)
class Answered:
    """One policy's answers, and what they moved."""

    rule: str
    sheet: Sheet
    traffic: Traffic


def answer(engine: Engine, tasks: Sequence[Task], rule: str, slots: int) -> Answered:
    model, store = imagining(engine.model, slots)
    own = Engine(model, generation=engine.generation)
    commit = "vanilla" if rule == "vanilla" else "policy"
    (sheet,) = run(own, tasks, [Arm(rule)], None, rows=1, asked={"commit": commit})
    return Answered(rule, sheet, store.ledger.traffic())


def imagining(model: Model, slots: int) -> tuple[Model, Imagined]:
    """The same model, its experts behind a memory of so many slots a layer that is imagined."""
    stores = [
        one.feed_forward.store for one in model.transformer.layers if is_moe(one.feed_forward)
    ]
    store = Imagined(stores[0], model.spec.router.experts, slots)
    layers = tuple(
        replace(one, feed_forward=replace(one.feed_forward, store=store))
        if is_moe(one.feed_forward)
        else one
        for one in model.transformer.layers
    )
    return replace(model, transformer=replace(model.transformer, layers=layers)), store


def is_moe(network: object) -> bool:
    return isinstance(network, MoE)


def grid(
    plays: Sequence[Play],
    caches: Sequence[str],
    shares: Sequence[str],
    sizes: dict[str, int],
) -> Grid:
    return Grid(plays, caches, [Capacity.parse(share) for share in shares], sizes, LINKS)


def document(made: Replay) -> dict[str, object]:
    return {
        "points": [point.document() for point in made.points],
        "overlap": {name: summary(found) for name, found in made.overlaps.items()},
    }


def summary(found: Overlap) -> dict[str, object]:
    names = ("step_jaccard", "block_jaccard", "step_cosine", "block_cosine")
    return {**vars(found), "means": {name: found.mean(name) for name in names}}


def tell(title: str, made: Replay) -> None:
    print(title)
    for point in made.points:
        case = point.case
        if case.precision == "bf16" and case.link == "25GB/s" and case.capacity.text == SHARE:
            saved = point.traffic.saved
            print(
                f"  {case.play!s:52} {case.cache:6} {point.experts:5.1f} experts "
                f"{point.loads:5.1f} loads, saved {saved:.1%}, votes {point.votes_kept:.3f}"
            )
    for name, found in made.overlaps.items():
        steps, blocks = found.mean("step_jaccard"), found.mean("block_jaccard")
        alike = [f"{value:.3f}" if value is not None else "-" for value in (steps, blocks)]
        print(f"  {name:52} alike {alike[0]} step to step, {alike[1]} block to block")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
