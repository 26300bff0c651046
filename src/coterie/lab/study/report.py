"""The report: every experiment on one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from coterie.lab.plotting import ColourScheme, render_svg
from coterie.lab.study.experiment import Drawing, Experiment, Finding, Table, Verdict

SCHEMES: tuple[ColourScheme, ...] = ("light", "dark")
VERDICT_MARKS: Mapping[Verdict, str] = {"holds": "✓", "does not hold": "✗", "inconclusive": "?"}


@dataclass(frozen=True)
class RenderedFigure:
    """A figure as SVG text in both colour schemes."""

    name: str
    caption: str
    svg: Mapping[ColourScheme, str]


@dataclass(frozen=True)
class ReportSection:
    """One section of the page; after a ``failure`` it has neither findings nor figures."""

    name: str
    title: str
    question: str
    figures: tuple[RenderedFigure, ...] = ()
    tables: tuple[Table, ...] = ()
    findings: tuple[Finding, ...] = ()
    record: Mapping[str, Any] | None = None  # the provenance of the numbers
    failure: str | None = None


@dataclass(frozen=True)
class ReportedClaim:
    """A claim of the paper, the experiment on it, and the verdicts of its findings."""

    text: str
    section: ReportSection
    verdicts: tuple[Verdict, ...]

    @property
    def verdict_texts(self) -> list[tuple[Verdict, str]]:
        """Each verdict once, with its count where verdicts differ."""
        counts = Counter(self.verdicts)
        differ = len(counts) > 1
        return [(v, f"{v} ({counts[v]})" if differ else v) for v in VERDICT_MARKS if counts[v]]


def collect_claims(sections: Sequence[ReportSection]) -> list[ReportedClaim]:
    """Every claim once per experiment, in the order of the page."""
    claims = []
    for section in sections:
        verdicts: dict[str, list[Verdict]] = {}
        for finding in section.findings:
            if finding.verdict is not None:
                verdicts.setdefault(finding.claim, []).append(finding.verdict)
        claims += [ReportedClaim(text, section, tuple(each)) for text, each in verdicts.items()]
    return claims


def make_section(
    experiment: Experiment,
    record: Mapping[str, Any] | None,
    failure: str | None = None,
    *,
    schemes: Sequence[ColourScheme] = SCHEMES,
) -> ReportSection:
    """Render an experiment from its record; without ``schemes`` the figures have no SVG."""
    text = experiment.text
    section = ReportSection(text.name, text.title, text.question, record=record, failure=failure)
    if record is None:
        return section
    try:
        parts = list(experiment.report(record["facts"]))
        figures = [render_figure(each, schemes) for each in parts if isinstance(each, Drawing)]
    # A record of an older version may not render; the other sections must.
    except Exception as error:
        reason = f"the record cannot be rendered ({type(error).__name__}: {error})"
        return replace(section, failure=f"{reason}; measure the experiment again")
    findings = (Finding(each) if isinstance(each, str) else each for each in parts)
    return replace(
        section,
        figures=tuple(figures),
        tables=tuple(each for each in parts if isinstance(each, Table)),
        findings=tuple(each for each in findings if isinstance(each, Finding)),
    )


def render_figure(drawing: Drawing, schemes: Sequence[ColourScheme]) -> RenderedFigure:
    """Draw a figure in these colour schemes."""
    svg: dict[ColourScheme, str] = {
        scheme: render_svg(drawing.draw, name=drawing.name, scheme=scheme) for scheme in schemes
    }
    return RenderedFigure(drawing.name, drawing.caption, svg)


def render_page(sections: Sequence[ReportSection]) -> str:
    """Self-contained HTML: no script, no network access, no other file."""
    return _render("report.html", sections, autoescape=True, schemes=SCHEMES)


def render_markdown(
    sections: Sequence[ReportSection],
    *,
    records: str,
    experts: str,
    points: Sequence[tuple[str, str]] = (),
) -> str:
    """The opening page in Markdown: the summary ``points``, all claims, links to experiments."""
    values = {"records": records, "experts": experts, "points": points}
    return _render("report.md", sections, autoescape=False, **values)


def render_section(section: ReportSection, *, records: str, figures: Collection[str] = ()) -> str:
    """The page of one experiment in Markdown. ``figures`` are the files in ``../figures/``."""
    values = {"records": records, "figures": figures}
    return _render("report_section.md", [section], autoescape=False, **values)


def _render(
    template: str, sections: Sequence[ReportSection], *, autoescape: bool, **values: object
) -> str:
    environment = jinja2.Environment(
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["machine"] = machine_text
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        sections=sections,
        marks=VERDICT_MARKS,
        sources=[section.record for section in sections if section.record is not None],
        claims=collect_claims(sections),
        **values,
    )


def machine_text(machine: Mapping[str, Any]) -> str:
    """Cores, processor, memory and device of a record's machine."""
    memory_mib, device = machine.get("memory_mib"), machine["device"]
    memory = f", {memory_mib / 1024:.0f} GiB" if memory_mib else ""
    on_device = "" if device == "cpu" else f", on {device}"
    return f"{machine['cores']} cores of {machine['processor']}{memory}{on_device}"
