"""Writes the generated parts of the documents: tables, the results and the README's picture.

tables   the tables of docs/evaluation.md, from two records under results/
results  docs/results.md, docs/results/ and their figures, from the study's records; --study FOLDER
         copies new ones
picture  docs/picture.svg: two moments of a generation, as `coterie generate --watch` shows them
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.text import Text

import coterie
from coterie.cli.live_view import LiveView, make_view
from coterie.lab.plotting import ColourScheme
from coterie.lab.study.experiment import read_record
from coterie.lab.study.report import (
    SCHEMES,
    ReportSection,
    make_section,
    render_markdown,
    render_section,
)
from coterie.lab.study.study import EXPERIMENTS
from coterie.lab.study.summary import summary_points
from coterie.routing import update_policies_in_json

ROOT = Path(__file__).parents[1]
TABLES_PAGE = ROOT / "docs" / "evaluation.md"
TABLES = re.compile(r"(<!-- figures:[^>]*-->\n).*?(<!-- end of figures -->)", re.S)
ACCURACY_RECORD = ROOT / "results" / "embedded-tasks-by-policy.json"
SPEED_RECORD = ROOT / "results" / "generate-embedded-cpu.json"
RESULTS_PAGE = ROOT / "docs" / "results.md"
RESULT_PAGES = ROOT / "docs" / "results"  # one page for each experiment
STUDY_RECORDS = ROOT / "results" / "study"
FIGURES = ROOT / "docs" / "figures"
SHOWN_FIGURES = (  # the figures that docs/results shows; the study's report has all
    *("explosion", "accuracy", "accuracy-few", "latency-accuracy", "reconstruction-loss"),
    *("block-size", "voters", "protection", "random-control", "forwards"),
    *("experts-bytes", "experts-commits"),
)
PICTURE = ROOT / "docs" / "picture.svg"
PICTURE_WIDTH = 112  # characters
QUESTION = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
POLICY = "des-vote:beta=0.3"
UNMASK = "fixed:steps=6"  # slow enough to see: with its threshold the model needs a forward or two


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/docs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("tables", "results", "picture"))
    parser.add_argument("--study", type=Path, help="folder of a study whose records to take over")
    args = parser.parse_args(argv)
    if args.part == "tables":
        TABLES_PAGE.write_text(with_tables(TABLES_PAGE.read_text("utf-8")), encoding="utf-8")
    elif args.part == "results":
        write_results(args.study)
    else:
        PICTURE.write_text(draw_picture(), encoding="utf-8")
    return 0


def with_tables(text: str) -> str:
    """The page with its tables as the records have them; an absent record is left out."""
    tables = "\n".join(
        render(update_policies_in_json(read_json(path))) + source_line(path)
        for path, render in RENDERERS.items()
        if path.is_file()
    )
    return TABLES.sub(lambda marks: f"{marks[1]}{tables}{marks[2]}", text)


def accuracy_table(record: dict[str, Any]) -> str:
    """Accuracy by policy, with the change against vanilla on the same problems."""
    policies = record["facts"]["policies"]
    tasks = list(policies[0]["by_task"])
    lines = [
        f"| policy | right, 95 % interval | {' | '.join(tasks)} | change, p | experts a layer "
        "| forwards a block |",
        "|---|---|" + "---|" * len(tasks) + "---|---|---|",
    ]
    for row in policies:
        total, change = row["accuracy"], row["change"]
        low, high = total["interval"]
        difference = "" if change is None else f"{change['value']:+.1%}, {change['p']:.1g}"
        by_task = " | ".join(f"{row['by_task'][task]['value']:.1%}" for task in tasks)
        correct = f"{total['value']:.1%} of {total['n']}, {low:.1%} to {high:.1%}"
        cost = f"{row['experts']:.1f} | {row['forwards_per_block']:.1f}"
        lines.append(f"| `{row['policy']}` | {correct} | {by_task} | {difference} | {cost} |")
    return "\n".join(lines) + "\n"


def speed_table(record: dict[str, Any]) -> str:
    """Tokens per second by policy, with the experts that each layer reads."""
    facts = record["facts"]
    lines = [
        "| policy | experts a layer | tokens/s, spread | forwards | texts as vanilla |",
        "|---|---|---|---|---|",
    ]
    for measure in record["measures"]:
        counts = facts["policies"][measure["name"]]
        lines.append(
            f"| `{measure['name']}` | {counts['experts_mean']:.1f} of {counts['experts_total']} "
            f"| {measure['median']:.0f}, {measure['spread']:.0f} | {counts['forwards']} "
            f"| {counts['texts_as_vanilla']} of {facts['prompts']} |"
        )
    return "\n".join(lines) + "\n"


def source_line(path: Path) -> str:
    """The record, command, machine and commit of a table, as the paragraph under it."""
    record = read_json(path)
    machine, command = record["machine"], " ".join(record["command"])
    text = (
        f"`{path.relative_to(ROOT)}`: `{command}` on {machine['cores']} cores of "
        f"{machine['processor']}, torch {record['versions']['torch']}, commit "
        f"`{record['commit'].partition('+')[0][:12]}`."
    )
    return f"\n{fill(text, width=100, break_long_words=False, break_on_hyphens=False)}\n"


RENDERERS: dict[Path, Callable[[dict[str, Any]], str]] = {
    ACCURACY_RECORD: accuracy_table,
    SPEED_RECORD: speed_table,
}


def write_results(study: Path | None) -> None:
    """The pages of results and their figures, after new records of a study were copied."""
    for name in EXPERIMENTS if study is not None else ():
        if (record := Path(study or ".") / "records" / f"{name}.json").is_file():
            STUDY_RECORDS.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(record, STUDY_RECORDS / record.name)
    sections = report_sections()
    RESULT_PAGES.mkdir(parents=True, exist_ok=True)
    for path, text in results_pages(sections).items():
        path.write_text(text, encoding="utf-8")
    FIGURES.mkdir(parents=True, exist_ok=True)
    for figure in (figure for section in sections for figure in section.figures):
        for scheme in SCHEMES if figure.name in SHOWN_FIGURES else ():
            path = FIGURES / f"{figure.name}-{scheme}.svg"
            path.write_text(figure.svg[scheme] + "\n", encoding="utf-8")


def report_sections(schemes: Sequence[ColourScheme] = SCHEMES) -> list[ReportSection]:
    """Every experiment that has a record, in the study's order; drawn in these colour schemes."""
    records = {name: read_record(STUDY_RECORDS, name) for name in EXPERIMENTS}
    sections = [
        make_section(EXPERIMENTS[name], record, schemes=schemes)
        for name, record in records.items()
        if record is not None
    ]
    if failures := [
        f"{section.name}: {section.failure}" for section in sections if section.failure
    ]:
        raise SystemExit("\n".join(failures))
    return sections


def results_pages(sections: list[ReportSection]) -> dict[Path, str]:
    """The Markdown text of docs/results.md, and of each experiment's page."""
    facts = {one.name: one.record["facts"] for one in sections if one.record is not None}
    size = facts["accuracy"]
    experts = f"{size['experts']} experts per layer, of which a token uses {size['k']}"
    records = STUDY_RECORDS.relative_to(ROOT).as_posix()
    points = summary_points(sections, facts)
    pages = {
        RESULT_PAGES / f"{one.name}.md": render_section(one, records=records, figures=SHOWN_FIGURES)
        for one in sections
    }
    opening = render_markdown(sections, records=records, experts=experts, points=points)
    return {RESULTS_PAGE: opening, **pages}


def draw_picture() -> str:
    """An SVG of one generation in the terminal: half of the block unmasked, then all of it."""
    views = views_of(coterie.load())
    console = Console(
        record=True, width=PICTURE_WIDTH, file=io.StringIO(), color_system="truecolor"
    )
    options = f"--policy {POLICY} --unmask {UNMASK} --watch"
    command = f'coterie generate "{QUESTION}" \\\n    {options}'
    console.print(Text.assemble(("$ ", "dim"), command))
    for view in (half_unmasked(views), views[-1]):
        console.print()
        console.print(view)
    svg = console.export_svg(title="a block being unmasked")
    # Without the web fonts: the reader's own monospace font serves.
    return re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.S)


def views_of(engine: coterie.Engine) -> list[LiveView]:
    """The live view after every forward."""
    view, views = make_view(engine, POLICY), []
    for event in engine.stream(QUESTION, policy=POLICY, unmask=UNMASK):
        if isinstance(event, coterie.Denoised):
            view.update(event)
            views.append(replace(view, tokens=dict(view.tokens)))
    return views


def half_unmasked(views: Sequence[LiveView]) -> LiveView:
    """The view in which nearly half of the largest block is still provisional."""
    counts = [sum(mark.state == "provisional" for mark in v.tokens.values()) for v in views]
    pairs = zip(counts, views, strict=True)
    return min(pairs, key=lambda pair: abs(pair[0] - max(counts) / 2))[1]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
