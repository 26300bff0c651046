"""Measures what it saves, and costs, that a block keeps its coresets from step to step.

The model in the package answers problems under an imagined memory of 35 % of the experts, one row
at a time, commits by the policy too. Each policy elects anew in every step, then keeps its
coresets within several bounds; answers are paired with vanilla's and with those of the policy
without a bound. What a replay of vanilla's trace foretells stands beside. In two ways of decoding:
as the model is meant to be used, where a block rarely takes a second step, and in eight steps a
block, as a large model decodes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import coterie
from coterie.engine.engine import Engine
from coterie.engine.event import Result
from coterie.engine.memory import Memory
from coterie.evals.asking import Question, outcomes
from coterie.evals.stats import Share, paired
from coterie.evals.task import Task, Wish
from coterie.evals.tasks import open_tasks
from coterie.experts.capacity import Capacity
from coterie.keys import to_json
from coterie.planning.booking import Play
from coterie.planning.machine import Machine
from coterie.planning.recording import about, bias_of, record_trace
from coterie.planning.replay import Grid, Replayed, replay
from coterie.planning.trace import Writer, read
from coterie.problems import TASKS
from coterie.results import record, write_record
from coterie.routing import parse_policy
from coterie.study.remembering import Remembering

SEED = 9301
MEMORY = "35%"
BOUNDS = (None, 0.0, 0.02, 0.05, 0.1, 0.2)
POLICIES = (
    "des-vote:beta=0.3,voters=before-eos,protect=top1",
    "priced-vote:price=0.04,voters=before-eos,protect=top1",
)
WAYS: Mapping[str, Mapping[str, object]] = {
    "as it decodes": {},
    "in eight steps": {"unmask": "fixed:steps=8"},
}


@dataclass(frozen=True)
class Run:
    """One policy's answers in one way of decoding, and what they moved."""

    play: Play
    right: list[bool]
    results: list[Result]
    used: int
    moved: int
    expert_bytes: int

    @property
    def kept(self) -> tuple[float | None, float | None]:
        """The share of later steps' coresets that stayed, and the votes lost by it."""
        told = [
            (one.forwards - one.blocks, one.coresets_kept, one.drift)
            for one in self.results
            if one.coresets_kept is not None and one.drift is not None
        ]
        steps = sum(weight for weight, _, _ in told)
        if not steps:
            return None, None
        kept, lost = (sum(one[0] * one[part] for one in told) / steps for part in (1, 2))
        return kept, lost


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    engine = coterie.load()
    wish = Wish(engine.model.family.name, count=asked.items, seed=asked.seed)
    tasks: list[Task] = [Remembering(task) for task in open_tasks(list(TASKS), wish)]
    for way in asked.ways:
        facts = measured(engine, tasks, WAYS[way], asked.prompts)
        content = record(f"Drift {way}", ["scripts/drift", *words], [], facts=facts)
        print(write_record(asked.out, content), flush=True)
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/drift", description=__doc__)
    parser.add_argument("--items", type=int, default=125, help="problems of each of the four tasks")
    parser.add_argument("--prompts", type=int, default=20, help="of these, how many are traced")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def measured(
    engine: Engine, tasks: Sequence[Task], way: Mapping[str, object], prompts: int
) -> dict[str, object]:
    plays = [Play(parse_policy("vanilla"))]
    plays += [Play(parse_policy(name), bound, True) for name in POLICIES for bound in BOUNDS]
    told = foretold(engine, tasks, plays, way, prompts)
    runs = [answered(engine, tasks, play, way) for play in plays]
    fresh = {str(run.play.policy): run for run in runs if run.play.drift is None}
    rows = [
        row(run, runs[0], fresh[str(run.play.policy)], point)
        for run, point in zip(runs, told, strict=True)
    ]
    return {"memory": MEMORY, "commit": "policy", "decoding": dict(way), "policies": rows}


def answered(engine: Engine, tasks: Sequence[Task], play: Play, way: Mapping[str, object]) -> Run:
    """Every problem of every task, with an empty memory at first."""
    model = engine.model.imagining(Memory.parse(MEMORY, imagined=True))
    own = Engine(model, generation=engine.generation)
    asked: dict[str, object] = {**way, "commit": "policy" if play.commits else "vanilla"}
    asked |= {} if play.drift is None else {"drift": play.drift}
    questions = [
        Question(task, item, engine.generation.but(**task.generation()).but(**asked))
        for task in tasks
        for item in task.items()
    ]
    right, results = [], []
    for ended in outcomes(own, questions, play.policy, rows=1):
        for one in ended:
            if one.result is None:
                raise RuntimeError(one.error)
            results.append(one.result)
            right.append(one.question.task.grade(one.result.text, one.question.item).correct)
    store = model.rationed
    traffic = store.ledger.traffic()
    run = Run(play, right, results, traffic.used, traffic.moved, store.expert_bytes)
    print(f"{play!s:70} {sum(right)} of {len(right)}, {traffic.moved} moved", flush=True)
    return run


def foretold(
    engine: Engine,
    tasks: Sequence[Task],
    plays: Sequence[Play],
    way: Mapping[str, object],
    prompts: int,
) -> list[Replayed]:
    """By vanilla's trace of each task's first problems, one row at a time."""
    asked = [task.prompt(item) for task in tasks for item in task.items()[:prompts]]
    said = about(engine, policy="vanilla", generation=engine.generation, prompts={}, made={})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with Writer(path, said, bias_of(engine.model)) as writer:
            record_trace(engine, asked, writer, **way)
        trace = read(path)
    sizes, links = {"bf16": trace.about.expert_bytes["bf16"]}, {"": Machine(1e9)}
    grid = Grid(plays, ["lru"], [Capacity.parse(MEMORY)], sizes, links)
    return list(replay(trace, grid).points)


def row(run: Run, vanilla: Run, fresh: Run, point: Replayed) -> dict[str, object]:
    """As the record has it."""
    share, (kept, lost) = Share(sum(run.right), len(run.right)), run.kept
    forwards = sum(one.forwards for one in run.results)
    against = {"vanilla": vanilla, "electing anew": fresh}
    return {
        "policy": str(run.play.policy if run is vanilla else run.play),
        "drift": run.play.drift,
        "right": share.right,
        "n": share.n,
        "interval": share.interval,
        "against": {
            name: {"difference": duel.difference, "p": duel.p, **to_json(duel)}
            for name, other in against.items()
            if other is not run
            for duel in [paired(other.right, run.right)]
        },
        "forwards": forwards,
        "blocks": sum(one.blocks for one in run.results),
        "experts": sum(one.experts.mean * one.forwards for one in run.results) / forwards,
        "vote_mass_kept": sum(one.vote_mass_kept * one.forwards for one in run.results) / forwards,
        "coresets_kept": kept,
        "coresets_kept_foretold": point.coresets_kept,
        "votes_lost": lost,
        "experts_used": run.used,
        "experts_moved": run.moved,
        "bytes_moved": run.moved * run.expert_bytes,
        "bytes_a_forward": run.moved * run.expert_bytes / forwards,
        "saved_against_vanilla": 1 - run.moved / vanilla.moved,
        "saved_foretold": point.traffic.saved,
        "saved_against_electing_anew": 1 - run.moved / fresh.moved,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
