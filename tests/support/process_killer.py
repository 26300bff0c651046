"""Runs an evaluation in children that are killed at random moments, then once to its end.

    python killing.py MODEL FOLDER KILLS [short]

In a process of its own, so that torch is imported once and its children can be forked; "short":
where memory for experts is.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tiny_task import Quiz

import coterie
from coterie.engine.engine import Engine
from coterie.lab.evals.run import Variant, run_eval
from coterie.loading.expert_memory import ExpertMemoryConfig

ARMS = [Variant("vanilla"), Variant("des-vote:beta=0.25"), Variant("vanilla", {"block": 4})]
PREFERRING = [
    Variant("vanilla"),
    Variant("resident-vote:beta=0.3,resident_bonus=8,max_vote_loss=0.5"),
]
QUIZ = Quiz(count=24)
SHORT = {"rows": 1, "lasts": 5}


def short(model: str) -> Engine:
    """Behind a memory that is imagined."""
    engine = coterie.load(model, expert_memory=ExpertMemoryConfig.parse("35%", simulated=True))
    assert engine.model.store.traffic_log is not None
    engine.model.store.traffic_log.track_vanilla()
    return engine


def main(model: str, folder: Path, kills: int, *, rationed: bool) -> None:
    rng = random.Random(kills)
    engine = short(model) if rationed else coterie.load(model)
    arms, how = (PREFERRING, SHORT) if rationed else (ARMS, {"rows": 4})
    lines = folder / "items.jsonl"
    for _ in range(kills):
        size = lines.stat().st_size if lines.exists() else 0
        child = os.fork()
        if not child:
            run_eval(engine, [QUIZ], arms, folder, **how)
            os._exit(3)  # it was to be killed before
        while not lines.exists() or lines.stat().st_size == size:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    run_eval(engine, [QUIZ], arms, folder, **how)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), rationed=sys.argv[4:] == ["short"])
