"""Measures what `skip_settled` saves and costs: accuracy, forwards, experts and positions.

    python -m experiments settled-tokens --num-problems 125

The embedded model answers its own problems under every policy and limit, paired by problem. It
finishes most blocks in one forward; a second setting has eight forwards a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import coterie
from coterie.lab.evals.report import PolicySummary, summarize
from coterie.lab.evals.results import Variant
from coterie.lab.evals.run import run_eval, run_identity
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import open_tasks
from coterie.lab.problems import PROBLEM_MAKERS
from experiments.records import new_parser, save_record

POLICIES = ("vanilla", "des-vote:beta=0.3")
LIMITS = (None, 1, 2, 4)
RULES = ("threshold:p=0.9", "fixed:steps=8")
COLUMNS = ("experts", "forwards_per_block", "positions_per_forward")


def main(argv: Sequence[str]) -> int:
    parser = new_parser("settled-tokens", __doc__)
    parser.add_argument("--num-problems", type=int, default=125, help="problems of each task")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    engine = coterie.load()
    options = TaskOptions(engine.model.family.name, None, None, args.num_problems, seed=1)
    tasks = open_tasks(list(PROBLEM_MAKERS), options)
    facts: dict[str, object] = {"model": engine.model.name, "rows": args.batch_size}
    for rule in RULES:
        settings = {"options": {"unmask": rule}}
        compared = [
            summary
            for policy in POLICIES
            for summary in summarize(
                run_eval(
                    engine, tasks, variants(policy), None, batch_size=args.batch_size, **settings
                ),
                [task.name for task in tasks],
            )
        ]
        print(rule, *map(line, compared), sep="\n", flush=True)
        facts[rule] = {
            "run": run_identity(engine, tasks, **settings),
            "policies": [summary.to_dict() for summary in compared],
        }
    print(save_record(args.out, "Settled tokens", ["settled-tokens", *argv], facts=facts))
    return 0


def variants(policy: str) -> list[Variant]:
    """The policy with every limit; the first has none, and the others are compared with it."""
    return [Variant(policy, {} if n is None else {"skip_settled": n}) for n in LIMITS]


def line(summary: PolicySummary) -> str:
    figures = [f"{getattr(summary.result, name):.2f} {name}" for name in COLUMNS]
    return f"{summary.result.policy}: {summary.accuracy.value:.1%}, {', '.join(figures)}"
