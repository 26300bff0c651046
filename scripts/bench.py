"""Times generation under several policies and writes a record under results/.

Policies take turns within every round, so that a machine that slows down slows all of them. One
sample is one round: all prompts' new tokens over all their seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import coterie
from coterie.problems import TASKS, draw
from coterie.results import Measure, record, write_record

POLICIES = (
    "vanilla",
    "des-vote:beta=0.5",
    "des-vote:beta=0.3",
    "des-vote:beta=0.15",
    "des-seq:k=3",
)
SEED = 20_260_000  # of the prompts; they lie in the held-out split


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    engine = coterie.load(asked.model, device=asked.device, dtype=asked.dtype)
    prompts = asked.prompt or questions(asked.prompts)
    rounds = measure(engine, prompts, asked.policy or list(POLICIES), asked.rounds)
    device = str(engine.model.transformer.device)
    content = record(
        f"generate {Path(engine.model.name).name} {device.partition(':')[0]}",
        ["scripts/bench", *words],
        [speed(policy, done) for policy, done in rounds.items()],
        facts={
            "model": engine.model.name,
            "dtype": str(engine.model.transformer.dtype).removeprefix("torch."),
            "prompts": len(prompts),
            "policies": {policy: facts(done, rounds["vanilla"]) for policy, done in rounds.items()},
        },
        device=device_name(device),
    )
    tell(content)
    print(write_record(asked.out, content))
    return 0


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--model", help="a folder or a hub id; default: the model in the package")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--policy", action="append", help="may be repeated; vanilla always runs")
    parser.add_argument("--prompt", action="append", help="may be repeated, in place of problems")
    parser.add_argument("--prompts", type=int, default=8, help="how many held-out problems")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def questions(count: int) -> list[str]:
    """Held-out problems, the tasks taking turns."""
    rng = random.Random(SEED)
    makers = list(TASKS.values())
    return [draw(makers[i % len(makers)], rng, "test").prompt for i in range(count)]


def measure(
    engine: coterie.Engine, prompts: Sequence[str], policies: Sequence[str], rounds: int
) -> dict[str, list[list[coterie.Result]]]:
    """Policy -> round -> the result of every prompt; one round before the first is not kept."""
    named = dict.fromkeys(["vanilla", *policies])
    done: dict[str, list[list[coterie.Result]]] = {policy: [] for policy in named}
    for number in range(rounds + 1):
        for policy, kept in done.items():
            results = [engine.generate(prompt, policy=policy) for prompt in prompts]
            if number:
                kept.append(results)
    return done


def speed(policy: str, rounds: Sequence[Sequence[coterie.Result]]) -> Measure:
    samples = [sum(r.new_tokens for r in done) / sum(r.seconds for r in done) for done in rounds]
    return Measure(policy, "tokens/s", tuple(samples))


def facts(
    rounds: Sequence[Sequence[coterie.Result]], vanilla: Sequence[Sequence[coterie.Result]]
) -> dict[str, object]:
    """What does not depend on the clock: the first round's counts."""
    done = rounds[0]
    return {
        "experts_mean": sum(r.experts.mean for r in done) / len(done),
        "experts_total": done[0].experts.total,
        "expert_bytes": sum(r.expert_bytes for r in done) / len(done),
        "vote_mass_kept": sum(r.vote_mass_kept for r in done) / len(done),
        "forwards": sum(r.forwards for r in done),
        "new_tokens": sum(r.new_tokens for r in done),
        "texts_as_vanilla": sum(
            a.tokens == b.tokens for a, b in zip(done, vanilla[0], strict=True)
        ),
    }


def tell(content: dict[str, Any]) -> None:
    for measure in content["measures"]:
        counted = content["facts"]["policies"][measure["name"]]
        print(
            f"{measure['name']:24} {measure['median']:8.1f} tokens/s  +- {measure['spread']:.1f}"
            f"   {counted['experts_mean']:6.1f} experts   {counted['forwards']:4} forwards"
            f"   {counted['texts_as_vanilla']} of {content['facts']['prompts']} texts as vanilla"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
