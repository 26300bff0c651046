"""Measures what caching can save: real traces and drawn ones, replayed and held against real runs.

Three records. "Replay drawn mini": routing drawn in LLaDA2.0-mini's sizes, its overlap from step
to step taken from the model in the package. "Replay embedded": that model's own traces over the
grid of policy x capacity x precision. "Replay against runs": the same policies answering problems
under an imagined memory, accuracy paired with vanilla's, and how far the replay was off. The
policies' options were chosen on problems of seed 101; these are others. ``--dry-run`` walks every
path on few problems and small sizes: its numbers mean nothing.
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
from coterie.keys import to_json
from coterie.lab.evals.report import summarize
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.run import Variant, run_eval
from coterie.lab.evals.stats import holm_adjust, paired_difference
from coterie.lab.evals.task import Task, TaskOptions
from coterie.lab.evals.tasks import open_tasks
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.lab.records import make_record, write_record
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.hardware_model import HardwareModel, parse_bandwidth
from coterie.lab.replay.recorder import bias_of, record_trace, trace_header
from coterie.lab.replay.replay import (
    ReplayGrid,
    ReplayResult,
    decoding_only,
    replay,
    slots_of,
    steps_per_block,
)
from coterie.lab.replay.synthetic import (
    LLADA2_MINI,
    RoutingStats,
    SyntheticShape,
    calibrate_law,
    rescale_stats,
    routing_stats,
    synthetic_trace,
)
from coterie.lab.replay.trace import KINDS, Trace, TraceWriter, read_trace
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.offload.capacity import Capacity
from coterie.offload.store import total_traffic
from coterie.offload.traffic import Traffic
from coterie.routing import parse_policy

SEED = 9101
SHARE = "35%"
SHARES = ("12%", "25%", SHARE, "50%", "100%")
LINKS = {"25GB/s": HardwareModel(parse_bandwidth("25GB/s", "link"))}
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
    "proportional-vote:beta=0.3",
    "proportional-vote:beta=0.3,resident_bonus=3,max_vote_loss=0.2",
    *("priced-vote:price=0.022", "priced-vote:price=0.022,resident_bonus=1,max_vote_loss=0.1"),
    *("priced-vote:price=0.04", "priced-vote:price=0.04,resident_bonus=1,max_vote_loss=0.1"),
    "priced-vote:price=0.04,resident_bonus=3,max_vote_loss=0.1",
)
EXAMINED = tuple(rule for rule in RULES if rule.startswith("priced-vote"))


@dataclass(frozen=True)
class Extent:
    """How much is replayed; ``unique`` experts of a layer are what a drawn forward uses."""

    shape: SyntheticShape = LLADA2_MINI
    unique: float = UNIQUE
    blocks: int = DRAWN_BLOCKS
    shares: Sequence[str] = SHARES
    rules: Sequence[str] = RULES
    examined: Sequence[str] = EXAMINED
    drifting: str = RULES[3]
    variants: int = 4  # of the law that is drawn by


FULL = Extent()
DRY = Extent(
    SyntheticShape(
        layers=2, experts=32, k=4, tokens=8, steps=4, expert_bytes=LLADA2_MINI.expert_bytes
    ),
    *(20.0, 3, (SHARE,), RULES[:1], EXAMINED[:1], RULES[0], 1),
)


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    command, extent = ["scripts/replay", *words], DRY if asked.dry_run else FULL
    engine = coterie.load()
    wish = TaskOptions(engine.model.family.name, count=asked.items, seed=asked.seed)
    tasks = open_tasks(list(PROBLEM_MAKERS), wish)
    traces = {steps: traced(engine, tasks, asked.prompts, steps) for steps in (False, True)}
    if "drawn" in asked.parts:
        keep(asked.out, "Replay drawn mini", command, drawn(routing_stats(traces[True]), extent))
    if "embedded" in asked.parts:
        found = embedded(traces[False], traces[True], extent)
        keep(asked.out, "Replay embedded", command, found)
    if "runs" in asked.parts:
        found = held(engine, tasks, traces[False], extent)
        keep(asked.out, "Replay against runs", command, found)
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/replay", description=__doc__)
    parser.add_argument("--items", type=int, default=250, help="problems of each of the four tasks")
    parser.add_argument("--prompts", type=int, default=20, help="of these, how many are traced")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--parts", nargs="*", default=["drawn", "embedded", "runs"])
    parser.add_argument("--dry-run", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def keep(out: Path, title: str, command: Sequence[str], facts: dict[str, object]) -> None:
    print(write_record(out, make_record(title, command, [], facts=facts)), flush=True)


def traced(engine: Engine, tasks: Sequence[Task], count: int, slow: bool) -> Trace:
    """The first problems of each task, one row at a time; ``slow``: in eight steps a block, as a
    large model decodes."""
    generation = engine.generation.replace(**({"unmask": "fixed:steps=8"} if slow else {}))
    prompts = [task.prompt(item) for task in tasks for item in task.items()[:count]]
    said = trace_header(engine, policy="vanilla", generation=generation, prompts={}, provenance={})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with TraceWriter(path, said, bias_of(engine.model)) as writer:
            record_trace(engine, prompts, writer, unmask=generation.unmask)
        return read_trace(path)


def drawn(seen: RoutingStats, extent: Extent) -> dict[str, object]:
    """LLaDA2.0-mini's sizes at 35 %; then with tokens that remember more and less."""
    shape = extent.shape
    wanted = rescale_stats(seen, 128, extent.unique, shape.experts)
    told: dict[str, object] = {
        "read_off": to_json(seen),
        "blocks": extent.blocks,
        "steps": shape.steps,
    }
    for name, look in [*variants(wanted, shape.experts).items()][: extent.variants]:
        law = calibrate_law(shape, look)
        trace = synthetic_trace(shape, law, blocks=extent.blocks, seed=7)
        plays = [ReplayPolicy(parse_policy(policy)) for policy in DRAWN]
        plays.append(ReplayPolicy(parse_policy("resident-vote:beta=0.1"), reuse_tolerance=0.05))
        caches = ["lru", "lfu", "votes"] if name == "as read off" else ["lru"]
        shares = extent.shares if name == "as read off" else (SHARE,)
        kept = {name: size for name, size in shape.expert_bytes if name != "int4"}
        made = replay(trace, grid(plays, caches, shares, kept))
        found = {
            "wanted": to_json(look),
            "law": to_json(law),
            "came_to": to_json(routing_stats(trace)),
        }
        told[name] = {**found, **document(made)}
        tell(f"drawn, {name}", made)
    return told


def variants(wanted: RoutingStats, experts: int) -> dict[str, RoutingStats]:
    """The overlap from step to step as it was read off, halfway to chance, and halfway to all."""
    chance = wanted.unique / experts
    return {
        "as read off": wanted,
        "steps less alike": replace(wanted, step_overlap=(wanted.step_overlap + chance) / 2),
        "steps more alike": replace(wanted, step_overlap=(wanted.step_overlap + 1) / 2),
        "blocks more alike": replace(wanted, block_overlap=(wanted.block_overlap + 1) / 2),
    }


def embedded(quick: Trace, slow: Trace, extent: Extent) -> dict[str, object]:
    """The grid over the model's own traces: with commits routed by the policy, without, and of
    decoding forwards alone; and in eight steps a block."""
    told: dict[str, object] = {}
    for name, trace, commits in (
        ("commit=policy", quick, True),
        ("commit=vanilla", quick, False),
        ("decoding only", decoding_only(quick), False),
        ("eight steps a block, commit=policy", slow, True),
    ):
        plays = [ReplayPolicy(parse_policy("vanilla"))]
        plays += [ReplayPolicy(parse_policy(rule), routes_commits=commits) for rule in extent.rules]
        plays += (
            [ReplayPolicy(parse_policy(extent.drifting), 0.05, commits)] if trace is slow else []
        )
        whole = name == "commit=policy"
        sizes = dict(trace.header.expert_bytes)
        sizes = sizes if whole else {"bf16": sizes["bf16"]}
        made = replay(trace, grid(plays, ["lru"], extent.shares if whole else (SHARE,), sizes))
        kinds = {kind: sum(one.kind == kind for one in trace.forwards) for kind in KINDS}
        told[name] = {"forwards": kinds, "steps_per_block": steps_per_block(trace)}
        told[name] = {**told[name], **document(made)}  # type: ignore[dict-item]
        tell(name, made)
    return told


def held(engine: Engine, tasks: Sequence[Task], trace: Trace, extent: Extent) -> dict[str, object]:
    """Every policy asked each problem under an imagined memory of 35 %, prompts and commits in."""
    plays = [ReplayPolicy(parse_policy("vanilla"))]
    plays += [ReplayPolicy(parse_policy(rule), routes_commits=True) for rule in extent.examined]
    asked = grid(plays, ["lru"], (SHARE,), {"bf16": trace.header.expert_bytes["bf16"]})
    foretold = {str(p.case.replay_policy): p for p in replay(trace, asked).points}
    slots = slots_of(trace, asked, asked.cases()[0])
    answered = [answer(engine, tasks, rule) for rule in ("vanilla", *extent.examined)]
    vanilla, *others = answered
    duels = [paired_difference(vanilla.sheet.correct(), one.sheet.correct()) for one in others]
    raised = iter(holm_adjust([duel.p_value for duel in duels]))
    told = []
    report = summarize([one.sheet for one in answered], [task.name for task in tasks])
    for one, line in zip(answered, report, strict=True):
        right = one.sheet.correct()
        saved = 1 - one.traffic.experts_moved / vanilla.traffic.experts_moved
        point = foretold[one.rule].traffic.fraction_saved
        each = {
            "rule": one.rule,
            "used": one.traffic.experts_used,
            "moved": one.traffic.experts_moved,
            "saved": saved,
        }
        told.append({**each, "saved_foretold": point, "exam": line.to_dict()})
        print(f"{one.rule:42} {sum(right) / len(right):.1%} saved {saved:.1%} foretold {point:.1%}")
    return {
        "items": len(vanilla.sheet.answers),
        "slots": slots,
        "policies": told,
        "duels": [
            {"rule": one.rule, **to_json(duel), "p_holm": next(raised)}
            for one, duel in zip(others, duels, strict=True)
        ],
    }


@dataclass(frozen=True)
class Answered:
    """One policy's answers, and what they moved."""

    rule: str
    sheet: EvalResult
    traffic: Traffic


def answer(engine: Engine, tasks: Sequence[Task], rule: str) -> Answered:
    simulated = coterie.load(expert_memory=ExpertMemoryConfig.parse(SHARE, simulated=True)).model
    # The plain model has no store to reset between problems.
    model = replace(engine.model, transformer=simulated.transformer)
    own = Engine(model, generation=engine.generation)
    commit = "vanilla" if rule == "vanilla" else "policy"
    (sheet,) = run_eval(own, tasks, [Variant(rule)], None, batch_size=1, options={"commit": commit})
    return Answered(rule, sheet, total_traffic(simulated.store))


def grid(
    plays: Sequence[ReplayPolicy],
    caches: Sequence[str],
    shares: Sequence[str],
    sizes: dict[str, int],
) -> ReplayGrid:
    return ReplayGrid(plays, caches, [Capacity.parse(share) for share in shares], sizes, LINKS)


def document(made: ReplayResult) -> dict[str, object]:
    return {
        "points": [point.to_dict() for point in made.points],
        "overlap": {name: found.to_dict() for name, found in made.overlaps.items()},
    }


def tell(title: str, made: ReplayResult) -> None:
    print(title)
    for point in made.points:
        case = point.case
        if case.precision == "bf16" and case.link == "25GB/s" and case.capacity.text == SHARE:
            saved = point.traffic.fraction_saved
            print(
                f"  {case.replay_policy!s:52} {case.eviction:6} {point.experts:5.1f} experts "
                f"{point.loads:5.1f} loads, saved {saved:.1%}, votes {point.vote_share:.3f}"
            )
    for name, found in made.overlaps.items():
        steps, blocks = found.mean("step_jaccard"), found.mean("block_jaccard")
        alike = [f"{value:.3f}" if value is not None else "-" for value in (steps, blocks)]
        print(f"  {name:52} alike {alike[0]} step to step, {alike[1]} block to block")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
