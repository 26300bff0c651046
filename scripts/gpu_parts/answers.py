"""The package's own model on the device: graphs against none, and its answers against a CPU's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpu_parts.found import Figure, Found

import coterie
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import open_tasks

POLICIES = ("vanilla", "des-vote:beta=0.3")
TASKS = ("words", "algebra")  # the package's own that need no sandbox to be opened
ROWS = 16
SEED = 7001
EQUAL = 0.97  # of the answers; bf16 decides near-ties otherwise


def measure(device: torch.device, *, dry: bool = False, found: Found | None = None) -> Found:
    """fp32 with and without graphs, then bf16, each against fp32 on the CPU."""
    found = found or Found()
    prompts = _prompts(1)[:1] if dry else _prompts(100)
    for policy in POLICIES[:1] if dry else POLICIES:
        expected = _told(coterie.load(device="cpu", dtype="float32"), prompts, policy)
        for dtype, graphs in (("float32", False), ("float32", True), ("bfloat16", True)):
            name = f"{dtype} {'with' if graphs else 'without'} graphs, {policy}"
            with found.trying(f"answers, {name}"):  # the others are worth knowing
                engine = coterie.load(device=device, dtype=dtype, graphs=graphs)
                answers = _told(engine, prompts, policy)
                same = sum(a == b for a, b in zip(answers, expected, strict=True))
                found.facts[f"answers, {name}"] = {"equal": same, "of": len(prompts)}
                share = same / len(prompts)
                found.judge(Figure(f"answers as on a CPU, {name}", share, EQUAL, must=True))
    return found


def _prompts(each: int) -> list[str]:
    """So many problems of each task."""
    wish = TaskOptions(coterie.load(device="cpu").model.family.name, count=each, seed=SEED)
    return [task.prompt(item) for task in open_tasks(list(TASKS), wish) for item in task.items()]


def _told(engine: coterie.Engine, prompts: Sequence[str], policy: str) -> list[tuple[int, ...]]:
    """The tokens of every answer, so many rows at a time."""
    found: dict[int, tuple[int, ...]] = {}
    waiting = list(enumerate(prompts))
    numbers: dict[int, int] = {}
    while waiting or engine.rows:
        while waiting and len(engine.rows) < ROWS:
            place, prompt = waiting.pop(0)
            numbers[engine.submit(prompt, policy=policy)] = place
        for event in engine.step():
            if isinstance(event, coterie.Finished):
                found[numbers[event.row]] = event.result.tokens
    return [found[place] for place in range(len(prompts))]
