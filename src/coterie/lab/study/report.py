"""The report: every experiment on one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from coterie.lab.plotting import ColourScheme, render_svg
from coterie.lab.study.experiment import Drawing, Experiment, Finding, Table, Verdict

SCHEMES: tuple[ColourScheme, ...] = ("light", "dark")
VERDICT_MARKS: Mapping[Verdict, str] = {
    "holds": "✓",
    "does not hold": "✗",
    "inconclusive": "?",
}
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class RenderedFigure:
    """A figure as SVG text in both colour schemes."""

    name: str
    caption: str
    svg: Mapping[ColourScheme, str]


@dataclass(frozen=True)
class RecordSource:
    """The provenance of an experiment's numbers; ``path`` is that of the record."""

    path: str
    command: str
    when: str
    commit: str
    machine: str
    versions: str
    seconds: float
    model: str
    items: int
    prompts: int


@dataclass(frozen=True)
class ReportSection:
    """One section of the page; after a ``failure`` it has the parts that could be rendered."""

    name: str
    title: str
    question: str
    figures: tuple[RenderedFigure, ...] = ()
    tables: tuple[Table, ...] = ()
    findings: tuple[Finding, ...] = ()
    source: RecordSource | None = None
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
    by_key: dict[tuple[str, str], ReportedClaim] = {}
    for section in sections:
        for finding in section.findings:
            if finding.verdict is not None:
                key = section.name, finding.claim
                verdicts = by_key[key].verdicts if key in by_key else ()
                by_key[key] = ReportedClaim(finding.claim, section, (*verdicts, finding.verdict))
    return list(by_key.values())


def make_section(
    experiment: Experiment,
    record: Mapping[str, Any] | None,
    failure: str | None = None,
    *,
    schemes: Sequence[ColourScheme] = SCHEMES,
) -> ReportSection:
    """Render an experiment from its record; without ``schemes`` the figures have no SVG."""
    section = ReportSection(
        experiment.name, experiment.text.title, experiment.text.question, failure=failure
    )
    if record is None:
        return section
    section = replace(section, source=record_source(experiment.name, record), failure=None)
    data, findings = record["facts"], []
    try:
        for finding in experiment.findings(data):
            findings.append(finding if isinstance(finding, Finding) else Finding(finding))
        return replace(
            section,
            figures=tuple(render_figure(drawing, schemes) for drawing in experiment.drawings(data)),
            tables=tuple(experiment.tables(data)),
            findings=tuple(findings),
        )
    # A record of an older version may not render; the other sections must.
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return replace(
            section, failure=f"the record cannot be rendered ({text}); measure the experiment again"
        )


def render_figure(drawing: Drawing, schemes: Sequence[ColourScheme] = SCHEMES) -> RenderedFigure:
    """Draw a figure in these colour schemes."""
    svg: dict[ColourScheme, str] = {
        scheme: render_svg(drawing.draw, name=drawing.name, scheme=scheme) for scheme in schemes
    }
    return RenderedFigure(drawing.name, drawing.caption, svg)


def record_source(name: str, record: Mapping[str, Any]) -> RecordSource:
    """The provenance in a record."""
    machine, settings, versions = (record[key] for key in ("machine", "settings", "versions"))
    memory_mib = machine.get("memory_mib")
    return RecordSource(
        path=f"records/{name}.json",
        command=" ".join(record["command"]),
        when=record["when"],
        commit=record["commit"],
        machine=f"{machine['cores']} cores of {machine['processor']}"
        + (f", {memory_mib / 1024:.0f} GiB" if memory_mib else "")
        + ("" if machine["device"] == "cpu" else f", on {machine['device']}"),
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        seconds=record["seconds"],
        model=settings["model"],
        items=settings["items"],
        prompts=settings["prompts"],
    )


def render_page(sections: Sequence[ReportSection]) -> str:
    """Self-contained HTML: no script, no network access, no other file."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sources = [section.source for section in sections if section.source is not None]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        sections=sections,
        schemes=SCHEMES,
        marks=VERDICT_MARKS,
        model=sources[0].model if sources else "nothing yet",
        sources=sources,
        claims=collect_claims(sections),
        failures=[section for section in sections if section.failure is not None],
    )
