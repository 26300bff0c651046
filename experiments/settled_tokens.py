"""Measures what `skip_settled` saves and costs: accuracy, forwards, experts and positions.

    python -m experiments settled-tokens --num-problems 125

The embedded model answers its own problems under every policy and limit, paired by problem. It
finishes most blocks in one forward; the second rule takes eight forwards a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import coterie
from coterie.lab.evals.generation import EvalRequest, generate_outcomes
from coterie.lab.evals.report import summarize
from coterie.lab.evals.results import EvalResult, Variant
from coterie.lab.evals.run import make_answer, run_identity
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import open_tasks
from coterie.lab.problems import PROBLEM_MAKERS
from experiments.records import new_parser, save_record

POLICIES = ("vanilla", "des-vote:beta=0.3")
LIMITS = (None, 1, 2, 4)
RULES = ("threshold:p=0.9", "fixed:steps=8")


def main(argv: Sequence[str]) -> int:
    parser = new_parser("settled-tokens", __doc__)
    parser.add_argument("--num-problems", type=int, default=125, help="problems of each task")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    engine, names = coterie.load(), list(PROBLEM_MAKERS)
    options = TaskOptions(engine.model.family.name, count=args.num_problems)
    tasks, facts = open_tasks(names, options), {"model": engine.model.name, "rows": args.batch_size}
    for rule in RULES:
        generation = engine.generation.replace(unmask=rule)
        requests = [
            EvalRequest(task, item, generation.replace(**task.generation()))
            for task in tasks
            for item in task.items()
        ]
        policies: list[dict[str, object]] = []
        for policy in POLICIES:
            runs = [
                answer_all(engine, requests, variant, args.batch_size)
                for variant in limited(policy)
            ]
            summaries = summarize([result for result, _ in runs], names)
            for summary, (_, positions) in zip(summaries, runs, strict=True):
                policies.append({**summary.to_dict(), "positions_per_forward": positions})
                print(rule, summary.result.policy, summary.accuracy.value, positions, flush=True)
        identity = run_identity(engine, tasks, options={"unmask": rule})
        facts[rule] = {"run": identity, "policies": policies}
    print(save_record(args.out, "Settled tokens", ["settled-tokens", *argv], facts=facts))
    return 0


def limited(policy: str) -> list[Variant]:
    """The policy without a limit, with which the others are compared, and with each limit."""
    return [Variant(policy, {} if n is None else {"skip_settled": n}) for n in LIMITS]


def answer_all(
    engine: coterie.Engine, requests: Sequence[EvalRequest], variant: Variant, batch_size: int
) -> tuple[EvalResult, float]:
    """The answers in the order of the requests, and the mean positions of a denoising forward."""
    own = [request.replace(variant.generation) for request in requests]
    steps = generate_outcomes(engine, own, variant.policy, batch_size=batch_size)
    outcomes = [outcome for step in steps for outcome in step]
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    answers = {each.key[1:]: each for each in (make_answer(variant.name, o) for o in outcomes)}
    ordered = tuple(answers[request.task.name, request.item.id] for request in requests)
    positions = sum(result.computed_positions for result in results)
    forwards = sum(result.forwards for result in results)
    return EvalResult(variant, ordered), positions / forwards
