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
from coterie.engine.events import Result
from coterie.keys import to_json
from coterie.lab.evals.generation import EvalRequest, generate_outcomes
from coterie.lab.evals.stats import Proportion, paired_difference
from coterie.lab.evals.task import Task, TaskOptions
from coterie.lab.evals.tasks import open_tasks
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.lab.records import make_record, write_record
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.hardware_model import HardwareModel
from coterie.lab.replay.recorder import bias_of, record_trace, trace_header
from coterie.lab.replay.replay import ReplayGrid, ReplayPoint, replay
from coterie.lab.replay.trace import TraceWriter, read_trace
from coterie.lab.study.cached_grading import CachedGradesTask
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.offload.capacity import Capacity
from coterie.offload.store import total_traffic
from coterie.routing import parse_policy

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

    play: ReplayPolicy
    right: list[bool]
    results: list[Result]
    used: int
    moved: int
    expert_bytes: int

    @property
    def kept(self) -> tuple[float | None, float | None]:
        """The share of later steps' coresets that stayed, and the votes lost by it."""
        told = [
            (one.forwards - one.blocks, one.coreset_reuse_rate, one.reuse_vote_loss)
            for one in self.results
            if one.coreset_reuse_rate is not None and one.reuse_vote_loss is not None
        ]
        steps = sum(weight for weight, _, _ in told)
        if not steps:
            return None, None
        kept, lost = (sum(one[0] * one[part] for one in told) / steps for part in (1, 2))
        return kept, lost


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    engine = coterie.load()
    wish = TaskOptions(engine.model.family.name, count=asked.items, seed=asked.seed)
    tasks: list[Task] = [CachedGradesTask(task) for task in open_tasks(list(PROBLEM_MAKERS), wish)]
    for way in asked.ways:
        facts = measured(engine, tasks, WAYS[way], asked.prompts)
        content = make_record(f"Drift {way}", ["scripts/drift", *words], [], facts=facts)
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
    plays = [ReplayPolicy(parse_policy("vanilla"))]
    plays += [
        ReplayPolicy(parse_policy(name), bound, True) for name in POLICIES for bound in BOUNDS
    ]
    told = foretold(engine, tasks, plays, way, prompts)
    runs = [answered(engine, tasks, play, way) for play in plays]
    fresh = {str(run.play.policy): run for run in runs if run.play.reuse_tolerance is None}
    rows = [
        row(run, runs[0], fresh[str(run.play.policy)], point)
        for run, point in zip(runs, told, strict=True)
    ]
    return {"memory": MEMORY, "commit": "policy", "decoding": dict(way), "policies": rows}


def answered(
    engine: Engine, tasks: Sequence[Task], play: ReplayPolicy, way: Mapping[str, object]
) -> Run:
    """Every problem of every task, with an empty memory at first."""
    model = coterie.load(expert_memory=ExpertMemoryConfig.parse(MEMORY, simulated=True)).model
    own = Engine(model, generation=engine.generation)
    asked: dict[str, object] = {**way, "commit": "policy" if play.routes_commits else "vanilla"}
    asked |= {} if play.reuse_tolerance is None else {"drift": play.reuse_tolerance}
    questions = [
        EvalRequest(task, item, engine.generation.replace(**task.generation()).replace(**asked))
        for task in tasks
        for item in task.items()
    ]
    right, results = [], []
    for ended in generate_outcomes(own, questions, play.policy, batch_size=1):
        for one in ended:
            if one.result is None:
                raise RuntimeError(one.error)
            results.append(one.result)
            right.append(one.request.task.grade(one.result.text, one.request.item).correct)
    traffic = total_traffic(model.store)
    run = Run(play, right, results, traffic.experts_used, traffic.experts_moved, traffic.expert_bytes)
    print(f"{play!s:70} {sum(right)} of {len(right)}, {traffic.experts_moved} moved", flush=True)
    return run


def foretold(
    engine: Engine,
    tasks: Sequence[Task],
    plays: Sequence[ReplayPolicy],
    way: Mapping[str, object],
    prompts: int,
) -> list[ReplayPoint]:
    """By vanilla's trace of each task's first problems, one row at a time."""
    asked = [task.prompt(item) for task in tasks for item in task.items()[:prompts]]
    said = trace_header(
        engine, policy="vanilla", generation=engine.generation, prompts={}, provenance={}
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with TraceWriter(path, said, bias_of(engine.model)) as writer:
            record_trace(engine, asked, writer, **way)
        trace = read_trace(path)
    sizes, links = {"bf16": trace.header.expert_bytes["bf16"]}, {"": HardwareModel(1e9)}
    grid = ReplayGrid(plays, ["lru"], [Capacity.parse(MEMORY)], sizes, links)
    return list(replay(trace, grid).points)


def row(run: Run, vanilla: Run, fresh: Run, point: ReplayPoint) -> dict[str, object]:
    """As the record has it."""
    share, (kept, lost) = Proportion(sum(run.right), len(run.right)), run.kept
    forwards = sum(one.forwards for one in run.results)
    against = {"vanilla": vanilla, "electing anew": fresh}
    return {
        "policy": str(run.play.policy if run is vanilla else run.play),
        "drift": run.play.reuse_tolerance,
        "right": share.successes,
        "n": share.n,
        "interval": share.interval,
        "against": {
            name: {"difference": duel.difference, "p": duel.p_value, **to_json(duel)}
            for name, other in against.items()
            if other is not run
            for duel in [paired_difference(other.right, run.right)]
        },
        "forwards": forwards,
        "blocks": sum(one.blocks for one in run.results),
        "experts": sum(one.experts.mean * one.forwards for one in run.results) / forwards,
        "vote_mass_kept": sum(one.vote_mass_kept * one.forwards for one in run.results) / forwards,
        "coresets_kept": kept,
        "coresets_kept_foretold": point.coresets_reused,
        "votes_lost": lost,
        "experts_used": run.used,
        "experts_moved": run.moved,
        "bytes_moved": run.moved * run.expert_bytes,
        "bytes_a_forward": run.moved * run.expert_bytes / forwards,
        "saved_against_vanilla": 1 - run.moved / vanilla.moved,
        "saved_foretold": point.traffic.fraction_saved,
        "saved_against_electing_anew": 1 - run.moved / fresh.moved,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
