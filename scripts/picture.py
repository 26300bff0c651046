"""Draws two moments of one generation as ``generate --watch`` shows them: half way and done."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

import coterie
from coterie.cli.live_view import LiveView, make_view

QUESTION = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
POLICY = "des-vote:beta=0.3"
UNMASK = "fixed:steps=6"  # slow enough to see: by its threshold the model needs a forward or two
WIDTH = 112


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/picture", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/picture.svg"))
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--policy", default=POLICY)
    parser.add_argument("--unmask", default=UNMASK)
    asked = parser.parse_args(words)
    moments = unmasked(asked.question, asked.policy, asked.unmask)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor")
    chosen = f"--policy {asked.policy} --unmask {asked.unmask} --watch"
    typed = f'coterie generate "{asked.question}" \\\n    {chosen}'
    console.print(Text.assemble(("$ ", "dim"), typed))
    for moment in (half_way(moments), moments[-1]):
        console.print()
        console.print(moment)
    drawn = console.export_svg(title="a block being unmasked")
    # The fonts would come from elsewhere; a reader's own monospace serves.
    asked.out.write_text(re.sub(r"@font-face \{.*?\}\n?", "", drawn, flags=re.S), encoding="utf-8")
    print(asked.out)
    return 0


def unmasked(question: str, policy: str, unmask: str) -> list[LiveView]:
    """The view after every forward."""
    engine = coterie.load()
    screen, moments = make_view(engine, policy), []
    for event in engine.stream(question, policy=policy, unmask=unmask):
        if isinstance(event, coterie.Denoised):
            screen.update(event)
            moments.append(replace(screen, tokens=dict(screen.tokens)))
    return moments


def half_way(moments: Sequence[LiveView]) -> LiveView:
    """The moment at which most nearly half of the fullest block is still a guess."""
    waiting = [
        sum(mark.state == "provisional" for mark in moment.tokens.values()) for moment in moments
    ]
    middle = max(waiting) / 2
    return min(zip(waiting, moments, strict=True), key=lambda pair: abs(pair[0] - middle))[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
