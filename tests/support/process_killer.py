"""Runs an evaluation in children that are killed at random moments, then once to its end.

    python process_killer.py MODEL FOLDER KILLS [cached]

In a process of its own, so that torch is imported once and its children can be forked. "cached"
simulates a cache of experts.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tiny_task import make_quiz

import coterie
from coterie.engine.engine import Engine
from coterie.lab.evals.run import Variant, run_eval
from coterie.lab.evals.task import Task
from coterie.loading.expert_memory import ExpertMemoryConfig

VARIANTS = [Variant("vanilla"), Variant("des-vote:beta=0.25"), Variant("vanilla", {"block": 4})]
CACHED_VARIANTS = [
    Variant("vanilla"),
    Variant("resident-vote:beta=0.3,resident_bonus=8,max_vote_loss=0.5"),
]
CACHED_OPTIONS = {"batch_size": 1, "reset_every": 5}


def quiz(kills: int) -> Task:
    """Enough items that every kill comes before the end."""
    return make_quiz(count=2 + 2 * kills)


def cached_engine(model: str) -> Engine:
    """An engine with a simulated cache that also counts vanilla's traffic."""
    engine = coterie.load(
        model, expert_memory=ExpertMemoryConfig.parse("35%", simulated=True), block=8
    )
    assert engine.model.store.traffic_log is not None
    engine.model.store.traffic_log.track_vanilla()
    return engine


def main(model: str, folder: Path, kills: int, *, cached: bool) -> None:
    rng, tasks = random.Random(kills), [quiz(kills)]
    engine = cached_engine(model) if cached else coterie.load(model, block=8)
    variants, options = (
        (CACHED_VARIANTS, CACHED_OPTIONS) if cached else (VARIANTS, {"batch_size": 4})
    )
    log = folder / "items.jsonl"
    for _ in range(kills):
        size = log.stat().st_size if log.exists() else 0
        child = os.fork()
        if not child:
            try:
                run_eval(engine, tasks, variants, folder, **options)
            finally:
                os._exit(3)  # it should have been killed before
        while (not log.exists() or log.stat().st_size == size) and not _has_ended(child):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    run_eval(engine, tasks, variants, folder, **options)


def _has_ended(child: int) -> bool:
    """Whether the child is a zombie; it stays one until the caller waits for it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), cached=sys.argv[4:] == ["cached"])
