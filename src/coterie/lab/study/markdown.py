"""The study as a Markdown document, with a summary and the findings and tables of the report."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coterie.lab.study.experiment import Finding, Table
from coterie.lab.study.report import VERDICT_MARKS, ReportSection, collect_claims

INTRODUCTION = """\
# Results

Results of the study of the model in the package, compared with the paper (*Dynamic Expert
Sharing*, arXiv 2602.00879). `scripts/docs` generates this page from the records under
`{records}`. `coterie study -o DIR` measures everything again, on this model or another, and writes
a report with every figure.

The model has {experts}.
It was trained on small problems with checkable answers. It is much smaller than the language models
of the paper, so a claim that does not hold on it may still hold on a large model.
"""


def render_markdown(
    sections: Sequence[ReportSection],
    *,
    records: str,
    experts: str,
    figures: Collection[str] = (),
    points: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole page. ``figures`` are the files in ``figures/``, ``points`` the summary."""
    parts = [
        INTRODUCTION.format(records=records, experts=experts),
        *([summary_section(sections, points)] if points else []),
        claims_section(sections),
        *(experiment_section(section, records, figures) for section in sections),
    ]
    return "\n".join(parts).rstrip() + "\n"


def summary_section(sections: Sequence[ReportSection], points: Sequence[tuple[str, str]]) -> str:
    """The sample sizes, and the main findings with links to their sections."""
    by_name = {section.name: section for section in sections}
    source = next((one.source for one in sections if one.source is not None), None)
    lines = []
    if source is not None:
        lines.append(
            f"{len(sections)} experiments on `{source.model}`, with {source.items} problems per "
            f"policy and {source.prompts} prompts for experiments on single forwards, on "
            f"{source.machine}. Differences are paired on the same problems.\n"
        )
    for name, text in points:
        link = f" [Details](#{anchor(by_name[name])})" if name else " [Table](#claims)"
        lines.append(f"- {text}{link}")
    return "## Summary\n\n" + "\n".join(lines) + "\n"


def claims_section(sections: Sequence[ReportSection]) -> str:
    """Every claim with its verdicts."""
    rows = [
        [
            f"[{claim.text}](#{anchor(claim.section)})",
            ", ".join(f"{VERDICT_MARKS[verdict]} {text}" for verdict, text in claim.verdict_texts),
        ]
        for claim in collect_claims(sections)
    ]
    table = Table(["claim, with a link to the experiment", "verdict"], rows)
    return f"## Claims\n\n{markdown_table(table)}"


def experiment_section(section: ReportSection, records: str, figures: Collection[str]) -> str:
    """One experiment: question, findings, figures, tables, source."""
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
    """A Markdown table."""
    rules = ["---:" if column in table.numbers else "---" for column in range(len(table.heads))]
    rows = [table.heads, rules, *table.rows]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def anchor(section: ReportSection) -> str:
    """The anchor that code hosts generate from the heading."""
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
