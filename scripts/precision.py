"""Experts in two precisions on the embedded model, paired on fresh problems; writes a record.

Packs the model in int8 and int4 and gives experts so much memory: of one precision alone, and of
both, under each placement. Then it holds the loss bound against layers of Gaussian weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from precision_drawn import drawn
from precision_layers import layers

import coterie
from coterie.engine.coarse import LowPrecisionExperts
from coterie.engine.convert import ConversionTarget, convert
from coterie.engine.engine import Engine
from coterie.engine.memory import ExpertMemoryConfig
from coterie.engine.mixing import PackedModel, precision_errors
from coterie.engine.source import EMBEDDED
from coterie.engine.warm import SavedVotes
from coterie.evals.run import Variant, run_eval
from coterie.evals.sheet import EvalResult
from coterie.evals.stats import Proportion, holm_adjust, paired_difference
from coterie.evals.task import Task, TaskOptions
from coterie.evals.tasks import open_tasks
from coterie.experts.mixed import MixedPrecisionStore, vote_shares
from coterie.planning.booking import TraceVotes as Remembered
from coterie.planning.recording import trace_header, bias_of, record_trace
from coterie.planning.trace import TraceWriter, read_trace
from coterie.problems import PROBLEM_MAKERS
from coterie.results import make_record, write_record

SEED, VOTING_SEED = 7013, 7014
SHARES = (0.25, 0.5, 0.75)
PLACEMENTS = (
    *(f"upgrades:most=2,share={share}" for share in SHARES),
    *(f"ballot:mass={mass},share=0.5" for mass in (0.5, 0.7, 0.85)),
    "votes:share=0.5",
)
WHOLE = 0.7  # of int8's bytes: room for every expert in one precision or the other


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    command = ["scripts/precision", *words]
    if "layers" in asked.parts:
        print(write_record(asked.out, make_record("Precision layers", command, [], facts=layers())))
    if "drawn" in asked.parts:
        facts = drawn(asked.share)
        print(
            write_record(asked.out, make_record("Precision drawn mini", command, [], facts=facts))
        )
    if "embedded" in asked.parts:
        facts = {"seed": asked.seed, "items_a_task": asked.items}
        with TemporaryDirectory() as folder:
            bench = Bench.of(Path(folder), asked)
            facts |= {"share": asked.share, "policy": asked.policy, **bench.facts()}
            facts["arms"] = told(bench.answered())
        title = f"Precision {asked.policy.partition(':')[0]}"
        print(write_record(asked.out, make_record(title, command, [], facts=facts)))
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/precision", description=__doc__)
    parser.add_argument("--items", type=int, default=250, help="problems of each of the four tasks")
    parser.add_argument("--voting", type=int, default=20, help="of each, how many vote beforehand")
    parser.add_argument("--share", type=float, default=0.35, help="of int8's bytes, for experts")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--policy", default="vanilla")
    parser.add_argument("--parts", nargs="*", default=["layers", "drawn", "embedded"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


@dataclass(frozen=True)
class Answered:
    """One memory's answers under one policy, and what its store came to."""

    memory: str
    sheet: EvalResult
    facts: Mapping[str, object]


@dataclass(frozen=True)
class Bench:
    """The model packed twice, the problems, and votes on other problems."""

    fine: Path
    coarse: Path
    tasks: Sequence[Task]
    votes: SavedVotes
    share: float
    policy: str

    @staticmethod
    def of(folder: Path, asked: argparse.Namespace) -> Bench:
        for kind in ("int8", "int4"):
            convert(EMBEDDED, folder / kind, ConversionTarget.parse(kind))
        engine = coterie.load(dtype="float32", device="cpu")
        family = engine.model.family.name
        tasks, others = (
            open_tasks(list(PROBLEM_MAKERS), TaskOptions(family, count=count, seed=seed))
            for count, seed in ((asked.items, asked.seed), (asked.voting, VOTING_SEED))
        )
        votes = voted(engine, others, folder)
        return Bench(folder / "int8", folder / "int4", tasks, votes, asked.share, asked.policy)

    def facts(self) -> dict[str, object]:
        """Of both precisions: bytes of an expert, and relative errors, layers alike, weighed by the
        votes of the unmodified model: the loss bound of one precision alone."""
        fine, coarse = PackedModel.open(self.fine), PackedModel.open(self.coarse)
        found = precision_errors(fine, coarse)
        assert found is not None
        votes = {layer: vote_shares(own, own >= 0) for layer, own in self.votes.by_layer().items()}
        errors = {
            kind: float(np.mean([getattr(found[at], part) @ votes[at] for at in found]))
            for kind, part in (("int8", "fine"), ("int4", "coarse"))
        }
        sizes = {"int8": fine.spec.expert_stride, "int4": coarse.spec.expert_stride}
        return {"error": errors, "expert_bytes": sizes}

    def answered(self) -> Iterator[Answered]:
        """The first holds all experts whole. One precision alone answers as with all in memory."""
        room = opened(self.fine, self._memory(self.share)).model.memory_plan
        assert room is not None
        yield self._answer("whole", opened(None))
        yield self._answer("int8", opened(self.fine, self._memory(self.share)))
        yield self._answer(
            "int4", opened(self.coarse, ExpertMemoryConfig.parse(f"{room.slot_bytes}B"))
        )
        for placement in PLACEMENTS:
            memory = self._memory(self.share, placement)
            yield self._answer(placement, opened(self.fine, memory))
        memory = self._memory(WHOLE, "votes")
        yield self._answer(f"votes, {WHOLE:.0%}", opened(self.fine, memory))

    def _memory(self, share: float, placement: str | None = None) -> ExpertMemoryConfig:
        if placement is None:
            return ExpertMemoryConfig.parse(f"{share:.0%}")
        coarse = LowPrecisionExperts.parse(str(self.coarse), placement)
        warm = self.votes if placement.startswith("votes") else None
        return ExpertMemoryConfig.parse(f"{share:.0%}", warm_start=warm, fallback_model=coarse)

    def _answer(self, name: str, engine: Engine) -> Answered:
        (sheet,) = run_eval(
            engine,
            self.tasks,
            [Variant(self.policy)],
            None,
            batch_size=1,
            options={"commit": "policy"},
        )
        return Answered(name, sheet, store_facts(engine))


def opened(folder: Path | None, memory: ExpertMemoryConfig | None = None) -> Engine:
    return coterie.load(folder, dtype="float32", device="cpu", expert_memory=memory)


def voted(engine: Engine, tasks: Sequence[Task], folder: Path) -> SavedVotes:
    prompts = [task.prompt(item) for task in tasks for item in task.items()]
    said = trace_header(
        engine, policy="vanilla", generation=engine.generation, prompts={}, provenance={}
    )
    with TraceWriter(folder / "trace", said, bias_of(engine.model)) as writer:
        record_trace(engine, prompts, writer)
    trace = read_trace(folder / "trace")
    return SavedVotes.of(EMBEDDED, trace.header.layers, Remembered.of(trace).mean_votes)


def store_facts(engine: Engine) -> dict[str, object]:
    store = engine.model.cached_store
    if store is None:
        return {}
    traffic = store.traffic_log.traffic()
    found: dict[str, object] = {
        "slots": store.capacity,
        "forwards": traffic.forwards,
        "experts_used": traffic.experts_used,
        "hit_rate": traffic.hit_rate,
        "bytes_moved": traffic.bytes_moved,
        "bytes_moved_from": {tier: one.bytes for tier, one in traffic.transfers.items()},
    }
    if isinstance(store, MixedPrecisionStore):
        served = store.precision_stats
        found |= {
            "fine_slots": store.high_precision.capacity,
            "coarse_slots": store.low_precision.capacity,
            "votes_fine": served.high_precision_share,
            "loss_bound": served.loss_bound,
            "loss_rms": served.loss_rms,
            "upgrades": served.promotions,
        }
    return found


def told(answered: Iterator[Answered]) -> list[dict[str, object]]:
    """Each against whole weights; Holm over all of them."""
    found, duels = [], []
    whole: EvalResult | None = None
    for one in answered:
        whole = whole or one.sheet
        right = Proportion(sum(one.sheet.correct()), len(one.sheet.correct()))
        duel = paired_difference(whole.correct(), one.sheet.correct())
        others = zip(whole.answers, one.sheet.answers, strict=True)
        line = {
            "memory": one.memory,
            "right": right.successes,
            "n": right.n,
            "accuracy": right.value,
            "interval": list(right.interval),
            "forwards_per_block": one.sheet.forwards_per_block,
            "outputs_changed": sum(a.output != b.output for a, b in others),
            **one.facts,
            "change": duel.difference,
            "change_interval": list(duel.interval),
            "gained": duel.gained,
            "lost": duel.lost,
        }
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        found.append(line)
        duels.append(duel)
    for line, p in zip(found[1:], holm_adjust([duel.p for duel in duels[1:]]), strict=True):
        line["p_holm"] = p
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
