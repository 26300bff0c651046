"""Times experts that do not all fit into memory, on a CPU with a disk behind it.

    scripts/loading FOLDER --make --kinds int8-packed --layers 20 --vocabulary 157184
    scripts/offload FOLDER/int8-packed

LLaDA2.0-mini's shape in int8, of random weights, and routing that is drawn: its law is that of
"Replay drawn mini", read off the model in the package. Three parts, each with a record of its own.

layers   the experts of a few layers alone, served from the disk and computed, policies and sizes of
         memory taking turns block by block; all experts in memory, and a store whose slots hold
         all, beside each other.
whole    the whole model writes text, 35 % of its experts in memory: attention, router, shared
         experts, logits and the loop of decoding included. It routes as the drawn trace does, for
         gates of random weights are not skewed.
resident the same with every expert in memory, where that has room for them.

The clock that replays foretell learns its rates from some of the runs, and the others, which took
turns with these, are held against it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from offload_parts import layers, whole
from offload_parts.bench import Bench, law_of, spec_of

from coterie.lab.records import make_record, write_record

DRAWN = Path("results/replay-drawn-mini.json")
PARTS = ("layers", "whole", "resident")


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    torch.set_num_threads(asked.threads)
    told = [Path(word).name if word == str(asked.folder) else word for word in words]
    bench = Bench(asked.folder, spec_of(asked.folder), law_of(asked.law))
    length = {"blocks": asked.blocks, "rounds": asked.rounds}
    measured = {
        "layers": lambda: layers.measure(bench, layers=asked.layers, **length),
        "whole": lambda: whole.measure(bench, **length),
        "resident": lambda: whole.resident(bench, **length),
    }
    for part in asked.parts:
        title, measures, facts = measured[part]()
        content = make_record(title, ["scripts/offload", *told], measures, facts=facts)
        print(write_record(asked.out, content), flush=True)
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/offload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a packed checkpoint, with its manifest")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--layers", type=int, default=2, help="of the part that has experts alone")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of a run")
    parser.add_argument("--rounds", type=int, default=2, help="turns of all runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--law", type=Path, default=DRAWN, help="the record whose law is drawn by")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
