"""Runs an evaluation in children that are killed at random moments, then once to its end.

    python killing.py MODEL FOLDER KILLS

In a process of its own, so that torch is imported once and its children can be forked.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from quiz import Quiz

import coterie
from coterie.evals.run import Arm, run

ARMS = [Arm("vanilla"), Arm("des-vote:beta=0.25"), Arm("vanilla", {"block": 4})]
QUIZ = Quiz(count=24)


def main(model: str, folder: Path, kills: int) -> None:
    rng = random.Random(kills)
    engine = coterie.load(model)
    lines = folder / "items.jsonl"
    for _ in range(kills):
        size = lines.stat().st_size if lines.exists() else 0
        child = os.fork()
        if not child:
            run(engine, [QUIZ], ARMS, folder, rows=4)
            os._exit(3)  # it was to be killed before
        while not lines.exists() or lines.stat().st_size == size:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    run(engine, [QUIZ], ARMS, folder, rows=4)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
