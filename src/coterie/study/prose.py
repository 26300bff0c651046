"""The study as a document in Markdown: the same findings and tables as the page has."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coterie.study.chapter import Finding, Table
from coterie.study.report import MARKS, Section, claims

INTRODUCTION = """\
# Results

What the study of the model in the package found, beside what the paper says (*Dynamic Expert
Sharing*, arXiv 2602.00879). `scripts/results` writes this page from the records under `{records}`;
nothing on it is typed by hand. `coterie study -o DIR` measures all of it again, on this model or
another, and tells the same on one page with every figure.

The model has {experts} and was made to need its router on small problems that can be checked; it
is no language model of the size that the paper speaks of. Where a claim holds here, that is one
more model on which it does. Where it does not, the claim needs more than the mechanism.
"""


def document(
    sections: Sequence[Section], *, records: str, experts: str, figures: Collection[str] = ()
) -> str:
    """The whole page; ``figures`` are those that lie beside it, in ``figures/``."""
    parts = [
        INTRODUCTION.format(records=records, experts=experts),
        claims_told(sections),
        *(chapter(one, records, figures) for one in sections),
    ]
    return "\n".join(parts).rstrip() + "\n"


def claims_told(sections: Sequence[Section]) -> str:
    """Where the paper's claims hold, and where they do not."""
    rows = [
        [
            f"[{claim.text}](#{anchor(claim.section)})",
            ", ".join(f"{MARKS[verdict]} {said}" for verdict, said in claim.told),
        ]
        for claim in claims(sections)
    ]
    table = Table(["the claim, and the chapter that looked", "here"], rows)
    return f"## The claims, at this scale\n\n{table_lines(table)}"


def chapter(one: Section, records: str, figures: Collection[str]) -> str:
    """One chapter: question, findings, figures, tables, source."""
    parts = [f"## {one.title}\n", f"*{one.question}*\n"]
    if one.findings:
        parts.append("\n".join(map(_finding, one.findings)) + "\n")
    parts += [_figure(f.name, f.caption) for f in one.figures if f.name in figures]
    parts += [f"{table.caption}\n\n{table_lines(table)}" for table in one.tables]
    if one.source is not None:
        source, commit = one.source, one.source.commit.partition("+")[0][:12]
        parts.append(
            f"`{records}/{one.name}.json`: `{source.command}`, {source.seconds:.0f} s on "
            f"{source.machine}; {source.versions}; commit `{commit}`.\n"
        )
    return "\n".join(parts)


def table_lines(table: Table) -> str:
    """A Markdown table; policies keep their spelling."""
    rules = ["---:" if place in table.numbers else "---" for place in range(len(table.heads))]
    rows = [table.heads, rules, *table.rows]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def anchor(one: Section) -> str:
    """As code hosts make it of a heading."""
    kept = "".join(sign for sign in one.title.lower() if sign.isalnum() or sign in " -_")
    return kept.replace(" ", "-")


def _finding(finding: Finding) -> str:
    if finding.verdict is None:
        return f"- {finding.text}"
    mark = f"{MARKS[finding.verdict]} {finding.verdict}"
    return f"- {finding.text}\n  **{mark}**: {finding.claim}"


def _figure(name: str, caption: str) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="figures/{name}-dark.svg">'
        f'<img src="figures/{name}-light.svg" alt="{caption.replace(chr(34), "")}"></picture>\n\n'
        f"{caption}\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
