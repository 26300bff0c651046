"""A baseline for tests: it answers as ``worker.py`` does, or fails in a named way."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "src" / "coterie" / "lab" / "bench"))
import worker  # pyright: ignore[reportMissingImports]

BEHAVIOUR, FOLDER = sys.argv[1], Path(sys.argv[2])


def layer_output(workload: worker.LayerWorkload, case: worker.TimedCase) -> np.ndarray:
    """The layer in fp32, one token and one expert after the other."""
    up, down = worker.make_experts(workload)
    out = np.zeros_like(case.x)
    for token, (ids, weights) in enumerate(zip(case.ids, case.weights, strict=True)):
        for expert, weight in zip(ids % worker.DISTINCT_EXPERTS, weights, strict=True):
            gate, value = np.split(up[expert] @ case.x[token], 2)
            out[token] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * value))
    return out


def answer(command: str, case_index: int) -> str:
    if command == "time":
        if BEHAVIOUR == "hangs":
            time.sleep(60)
        if BEHAVIOUR == "dies":
            print("out of sheep", file=sys.stderr, flush=True)
            sys.exit(3)
        return "nonsense" if BEHAVIOUR == "babbles" else "0.25"
    workload, cases = worker.read_workload(FOLDER)
    y = layer_output(workload, cases[case_index])
    output = {"lies": y * 1.5, "shrinks": y[:1]}.get(BEHAVIOUR, y)
    return str(worker.output_error(output, cases[case_index].expected))


if __name__ == "__main__":
    if BEHAVIOUR == "fails":
        print("failed ImportError: no sheep", flush=True)
        sys.exit(1)
    print('ready {"works": ["graze"], "versions": {"sheep": "1.0"}}', flush=True)
    for line in sys.stdin:
        command, _, case_index = line.split()
        print(answer(command, int(case_index)), flush=True)
