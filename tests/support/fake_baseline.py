"""A peer for tests, in one of several moods: it answers as ``worker.py`` does, or does not."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "src" / "coterie" / "lab" / "bench"))
import worker  # pyright: ignore[reportMissingImports]

MOOD, FOLDER = sys.argv[1], Path(sys.argv[2])


def experts(folder: Path, case: int) -> np.ndarray:
    """The layer in fp32, one token and one expert after the other."""
    work, cases = worker.read_work(folder)
    up, down = worker.few_experts(work)
    one = cases[case]
    out = np.zeros_like(one.x)
    for token, (ids, weights) in enumerate(zip(one.ids, one.weights, strict=True)):
        for expert, share in zip(ids % worker.FEW, weights, strict=True):
            gate, value = np.split(up[expert] @ one.x[token], 2)
            out[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * value))
    return out


def answered(verb: str, case: int, file: str) -> str:
    if verb == "time":
        if MOOD == "hangs":
            time.sleep(60)
        if MOOD == "dies":
            print("out of sheep", file=sys.stderr, flush=True)
            sys.exit(3)
        return "nonsense" if MOOD == "babbles" else "0.25"
    y = experts(FOLDER, case)
    np.save(file, {"lies": y * 1.5, "shrinks": y[:1]}.get(MOOD, y))
    return "kept"


if __name__ == "__main__":
    if MOOD == "fails":
        print("failed ImportError: no sheep", flush=True)
        sys.exit(1)
    print('ready {"works": ["graze"], "versions": {"sheep": "1.0"}}', flush=True)
    for line in sys.stdin:
        verb, _, case, *rest = line.split()
        print(answered(verb, int(case), rest[0] if rest else ""), flush=True)
