"""Runs one experiment: `python -m experiments NAME [--help]`."""

from __future__ import annotations

import sys
from importlib import import_module

EXPERIMENTS = {
    "demo": "experiments.demo",
    "gpu": "experiments.gpu.suite",
    "offload": "experiments.offload",
    "settled-tokens": "experiments.settled_tokens",
    "soak": "experiments.soak",
    "text-corpus": "experiments.text_corpus",
    "text-model": "experiments.text_model",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in EXPERIMENTS:
        print(f"usage: python -m experiments {{{','.join(EXPERIMENTS)}}} [--help]", file=sys.stderr)
        return 2
    return import_module(EXPERIMENTS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
