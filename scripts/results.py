"""Writes docs/results.md from the records of the study: none of its numbers is typed by hand.

With the folder of a study as argument, its records are taken over into results/study first.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from coterie.lab.plotting import ColourScheme
from coterie.lab.study.markdown import render_markdown
from coterie.lab.study.report import SCHEMES, ReportSection, make_section
from coterie.lab.study.study import EXPERIMENTS, renewed

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "study"
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "figures"
SHOWN = (  # the figures that the page has beside it; the report has all
    *("explosion", "accuracy", "accuracy-few", "latency-accuracy", "reconstruction-loss"),
    *("block-size", "voters", "protection", "random-control", "forwards"),
    *("experts-bytes", "experts-commits"),
)


def main() -> int:
    for study in sys.argv[1:]:
        take_over(Path(study) / "records")
    found = sections()
    PAGE.write_text(written(found), encoding="utf-8")
    draw(found)
    return 0


def take_over(records: Path) -> None:
    """Copies the records of chapters that there are; others stay as they are."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in EXPERIMENTS:
        if (records / f"{name}.json").is_file():
            shutil.copyfile(records / f"{name}.json", RECORDS / f"{name}.json")


def sections(schemes: Sequence[ColourScheme] = SCHEMES) -> list[ReportSection]:
    """Every chapter with a record, in the study's order; drawn in these schemes."""
    paths = {name: RECORDS / f"{name}.json" for name in EXPERIMENTS}
    records = {
        name: renewed(json.loads(path.read_text(encoding="utf-8")))
        for name, path in paths.items()
        if path.is_file()
    }
    told = [make_section(EXPERIMENTS[name], one, schemes=schemes) for name, one in records.items()]
    failed = [f"{one.name}: {one.failure}" for one in told if one.failure]
    if failed:
        raise SystemExit("\n".join(failed))
    return told


def written(found: list[ReportSection]) -> str:
    """The page as the records have it."""
    drawn = {figure.name for one in found for figure in one.figures} & set(SHOWN)
    accuracy = json.loads((RECORDS / "accuracy.json").read_text(encoding="utf-8"))["facts"]
    experts = f"{accuracy['experts']} experts in a layer, of which a token uses {accuracy['k']},"
    records = RECORDS.relative_to(ROOT).as_posix()
    return render_markdown(found, records=records, experts=experts, figures=drawn)


def draw(found: list[ReportSection]) -> None:
    """The page's figures, light and dark."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for figure in (figure for one in found for figure in one.figures if figure.name in SHOWN):
        for scheme in SCHEMES:
            path = FIGURES / f"{figure.name}-{scheme}.svg"
            path.write_text(figure.svg[scheme] + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
