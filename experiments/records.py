"""What all experiments share: the options of a command line and its records."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from coterie.keys import from_json
from coterie.lab.planner.synthetic_trace import RoutingLaw
from coterie.lab.records import Measurement, make_record, write_record

ROOT = Path(__file__).parents[1]
LAW_RECORD = ROOT / "results" / "replay-drawn-mini.json"


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that every experiment has: the folder of its records."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the records")
    return parser


def save_record(
    out: Path,
    title: str,
    command: Sequence[str],
    measures: Sequence[Measurement] = (),
    *,
    facts: Mapping[str, object],
    device: str = "cpu",
) -> Path:
    """Write a record that names the command, the commit and the machine; returns its path."""
    words = ["python", "-m", "experiments", *command]
    return write_record(out, make_record(title, words, measures, facts=facts, device=device))


def read_law(path: Path = LAW_RECORD) -> RoutingLaw:
    """The law of synthetic routing that the record "Replay drawn mini" fitted."""
    facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
    return from_json(RoutingLaw, facts["as read off"]["law"])
