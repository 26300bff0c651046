"""The embedded model on the device: with and without CUDA graphs, against the CPU's answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import coterie
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import open_tasks
from experiments.gpu.report import PartReport

POLICIES = ("vanilla", "des-vote:beta=0.3")
TASKS = ("words", "algebra")  # tasks of the package without a sandbox
ROWS = 16
SEED = 7001
MIN_EQUAL = 0.97  # of the answers: bf16 decides near-ties differently
SETTINGS = (("float32", False), ("float32", True), ("bfloat16", True))  # (dtype, CUDA graphs)


def measure(device: torch.device, report: PartReport, *, dry: bool = False) -> None:
    prompts = make_prompts(1)[:1] if dry else make_prompts(100)
    for policy in POLICIES[:1] if dry else POLICIES:
        expected = answer(coterie.load(device="cpu", dtype="float32"), prompts, policy)
        for dtype, graphs in SETTINGS:
            name = f"{dtype} {'with' if graphs else 'without'} graphs, {policy}"
            with report.attempt(f"answers, {name}"):
                engine = coterie.load(device=device, dtype=dtype, graphs=graphs)
                pairs = zip(answer(engine, prompts, policy), expected, strict=True)
                equal = sum(a == b for a, b in pairs)
                report.facts[f"answers, {name}"] = {"equal": equal, "of": len(prompts)}
                share = equal / len(prompts)
                report.add_figure(f"answers as on a CPU, {name}", share, MIN_EQUAL, required=True)


def make_prompts(count: int) -> list[str]:
    """So many problems of each task."""
    family = coterie.load(device="cpu").model.family.name
    tasks = open_tasks(list(TASKS), TaskOptions(family, count=count, seed=SEED))
    return [task.prompt(item) for task in tasks for item in task.items()]


def answer(engine: coterie.Engine, prompts: Sequence[str], policy: str) -> list[tuple[int, ...]]:
    """The tokens of every answer, ROWS prompts at a time."""
    answers: dict[int, tuple[int, ...]] = {}
    waiting, index_of = list(enumerate(prompts)), {}
    while waiting or engine.rows:
        while waiting and len(engine.rows) < ROWS:
            index, prompt = waiting.pop(0)
            index_of[engine.submit(prompt, policy=policy)] = index
        for event in engine.step():
            if isinstance(event, coterie.Finished):
                answers[index_of[event.row]] = event.result.tokens
    return [answers[index] for index in range(len(prompts))]
