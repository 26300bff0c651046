"""The study as a document in Markdown: the same findings and tables as the page has."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coterie.lab.study.experiment import Finding, Table
from coterie.lab.study.report import VERDICT_MARKS, ReportSection, collect_claims

INTRODUCTION = """\
# Results

What the study of the model in the package found, beside what the paper says (*Dynamic Expert
Sharing*, arXiv 2602.00879). `scripts/docs` writes this page from the records under `{records}`;
nothing on it is typed by hand. `coterie study -o DIR` measures all of it again, on this model or
another, and tells the same on one page with every figure.

The model has {experts} and was made to need its router on small problems that can be checked; it
is no language model of the size that the paper speaks of. Where a claim holds here, that is one
more model on which it does. Where it does not, the claim needs more than the mechanism.
"""


def render_markdown(
    sections: Sequence[ReportSection], *, records: str, experts: str, figures: Collection[str] = ()
) -> str:
    """The whole page; ``figures`` are those that lie beside it, in ``figures/``."""
    parts = [
        INTRODUCTION.format(records=records, experts=experts),
        claims_section(sections),
        *(experiment_section(section, records, figures) for section in sections),
    ]
    return "\n".join(parts).rstrip() + "\n"


def claims_section(sections: Sequence[ReportSection]) -> str:
    """Where the paper's claims hold, and where they do not."""
    rows = [
        [
            f"[{claim.text}](#{anchor(claim.section)})",
            ", ".join(f"{VERDICT_MARKS[verdict]} {text}" for verdict, text in claim.verdict_texts),
        ]
        for claim in collect_claims(sections)
    ]
    table = Table(["the claim, and the chapter that looked", "here"], rows)
    return f"## The claims, at this scale\n\n{markdown_table(table)}"


def experiment_section(section: ReportSection, records: str, figures: Collection[str]) -> str:
    """One chapter: question, findings, figures, tables, source."""
    parts = [f"## {section.title}\n", f"*{section.question}*\n"]
    if section.findings:
        parts.append("\n".join(map(_finding, section.findings)) + "\n")
    parts += [_figure(f.name, f.caption) for f in section.figures if f.name in figures]
    parts += [f"{table.caption}\n\n{markdown_table(table)}" for table in section.tables]
    if section.source is not None:
        source, commit = section.source, section.source.commit.partition("+")[0][:12]
        parts.append(
            f"`{records}/{section.name}.json`: `{source.command}`, {source.seconds:.0f} s on "
            f"{source.machine}; {source.versions}; commit `{commit}`.\n"
        )
    return "\n".join(parts)


def markdown_table(table: Table) -> str:
    """A Markdown table; policies keep their spelling."""
    rules = ["---:" if column in table.numbers else "---" for column in range(len(table.heads))]
    rows = [table.heads, rules, *table.rows]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def anchor(section: ReportSection) -> str:
    """As code hosts make it of a heading."""
    slug = "".join(sign for sign in section.title.lower() if sign.isalnum() or sign in " -_")
    return slug.replace(" ", "-")


def _finding(finding: Finding) -> str:
    if finding.verdict is None:
        return f"- {finding.text}"
    mark = f"{VERDICT_MARKS[finding.verdict]} {finding.verdict}"
    return f"- {finding.text}\n  **{mark}**: {finding.claim}"


def _figure(name: str, caption: str) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="figures/{name}-dark.svg">'
        f'<img src="figures/{name}-light.svg" alt="{caption.replace(chr(34), "")}"></picture>\n\n'
        f"{caption}\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
