"""Holds proportional elections against DES-Vote, DES-Seq and a guarded vote; writes a record.

The rules and their sizes were chosen on problems of the seeds 101, 102 and 103; these are others.
With --folder every answer is kept, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import coterie
from coterie.lab.evals.report import summarize
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.run import Variant, run_eval
from coterie.lab.evals.stats import holm_adjust, paired_difference
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import open_tasks
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.lab.records import make_record, write_record

SEED = 9001
BETAS = (0.15, 0.22, 0.3, 0.4)
PRICES = (0.18, 0.07, 0.022, 0.005)  # about as many experts on the problems used to choose
GUARD = "voters=before-eos,protect=top1"


@dataclass(frozen=True)
class Rules:
    """The spellings that meet at one size."""

    vote: str
    guarded: str
    proportional: str
    priced: str


SIZES = tuple(
    Rules(
        f"des-vote:beta={beta}",
        f"des-vote:beta={beta},{GUARD}",
        f"proportional-vote:beta={beta}",
        f"priced-vote:price={price}",
    )
    for beta, price in zip(BETAS, PRICES, strict=True)
)
SEQUENTIAL = ("des-seq:k=1", "des-seq:k=2", "des-seq:k=3")
BESIDE_UNION = (0.18, 0.04, 0.0102)  # priced elections of about as many experts as each union


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    engine = coterie.load()
    wish = TaskOptions(engine.model.family.name, count=asked.items, seed=asked.seed)
    tasks = open_tasks(list(PROBLEM_MAKERS), wish)
    rules = [rule for size in SIZES for rule in vars(size).values()]
    beside = [f"priced-vote:price={price}" for price in BESIDE_UNION]
    arms = [Variant(policy) for policy in dict.fromkeys(("vanilla", *rules, *SEQUENTIAL, *beside))]
    sheets = run_eval(engine, tasks, arms, asked.folder, batch_size=asked.rows)
    by_policy = {sheet.policy: sheet for sheet in sheets}
    facts = {
        "model": engine.model.name,
        "seed": asked.seed,
        "items_a_task": asked.items,
        "policies": [line.to_dict() for line in summarize(sheets, [task.name for task in tasks])],
        "duels": duels(by_policy),
    }
    content = make_record("Beyond DES-Vote", ["scripts/beyond", *words], [], facts=facts)
    tell(sheets, facts["duels"])
    print(write_record(asked.out, content))
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/beyond", description=__doc__)
    parser.add_argument("--items", type=int, default=250, help="problems of each of the four tasks")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where answers are kept")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def duels(sheets: Mapping[str, EvalResult]) -> list[dict[str, object]]:
    """Pairs on the same items, first the one to beat; Holm over the pairs of each question."""
    unions = zip(SEQUENTIAL, BESIDE_UNION, strict=True)
    questions = {
        "proportional-vote against des-vote": [(s.vote, s.proportional) for s in SIZES],
        "priced-vote against des-vote": [(s.vote, s.priced) for s in SIZES],
        "proportional-vote against the guarded vote": [(s.guarded, s.proportional) for s in SIZES],
        "priced-vote against the guarded vote": [(s.guarded, s.priced) for s in SIZES],
        "priced-vote against des-seq": [(s, f"priced-vote:price={price}") for s, price in unions],
    }
    told: list[dict[str, object]] = []
    for question, pairs in questions.items():
        found = [paired_difference(sheets[a].correct(), sheets[b].correct()) for a, b in pairs]
        raised = holm_adjust([duel.p_value for duel in found])
        for (a, b), duel, p in zip(pairs, found, raised, strict=True):
            told.append(
                {
                    "question": question,
                    "first": a,
                    "second": b,
                    "experts": [sheets[a].experts, sheets[b].experts],
                    "change": duel.difference,
                    "interval": list(duel.interval),
                    "gained": duel.gained,
                    "lost": duel.lost,
                    "p": duel.p_value,
                    "p_holm": p,
                }
            )
    return told


def tell(sheets: Sequence[EvalResult], found: Sequence[Mapping[str, object]]) -> None:
    for sheet in sheets:
        right = sheet.correct()
        print(
            f"{sheet.policy:48} {sum(right) / len(right):6.1%} of {len(right)}"
            f" {sheet.experts:6.1f} experts {sheet.forwards_per_block:5.2f} forwards a block"
            f" {sheet.tokens_per_second:6.0f} tokens/s"
        )
    for duel in found:
        low, high = duel["interval"]  # pyright: ignore[reportGeneralTypeIssues]
        print(
            f"{duel['second']} against {duel['first']}: {duel['change']:+.1%}"
            f" [{low:+.1%}, {high:+.1%}], p {duel['p_holm']:.1g}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
