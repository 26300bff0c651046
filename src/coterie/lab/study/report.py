"""The report: what every chapter found, on one page that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from coterie.lab.plotting import ColourScheme, render_svg
from coterie.lab.study.experiment import Drawing, Experiment, Finding, Table, Verdict

SCHEMES: tuple[ColourScheme, ...] = ("light", "dark")
VERDICT_MARKS: Mapping[Verdict, str] = {
    "holds": "✓",
    "does not hold": "✗",
    "cannot be told here": "?",
}
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class RenderedFigure:
    """A figure in both dresses, as SVG text."""

    name: str
    caption: str
    svg: Mapping[ColourScheme, str]


@dataclass(frozen=True)
class RecordSource:
    """Where a chapter's numbers come from, in words; ``path`` is the record's, in the folder."""

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
    """One chapter of the page; where it has a ``failure``, what could be shown is still there."""

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
    """Something the paper says, the chapter that looked, and what each finding came to."""

    text: str
    section: ReportSection
    verdicts: tuple[Verdict, ...]

    @property
    def verdict_texts(self) -> list[tuple[Verdict, str]]:
        """Each verdict once, in words, with how often it was found where they differ."""
        counts = Counter(self.verdicts)
        differ = len(counts) > 1
        return [(v, f"{v} ({counts[v]})" if differ else v) for v in VERDICT_MARKS if counts[v]]


def collect_claims(sections: Sequence[ReportSection]) -> list[ReportedClaim]:
    """Every claim once for each chapter, in the order of the page."""
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
    record: Mapping[str, object] | None,
    failure: str | None = None,
    *,
    schemes: Sequence[ColourScheme] = SCHEMES,
) -> ReportSection:
    """The chapter as it is told and drawn from its record; without ``schemes`` it is only told."""
    empty = ReportSection(experiment.name, experiment.title, experiment.question, failure=failure)
    if record is None:
        return empty
    data = record["facts"]
    assert isinstance(data, dict)
    try:
        return ReportSection(
            name=experiment.name,
            title=experiment.title,
            question=experiment.question,
            figures=tuple(render_figure(drawing, schemes) for drawing in experiment.drawings(data)),
            tables=tuple(experiment.tables(data)),
            findings=tuple(map(_as_finding, experiment.findings(data))),
            source=record_source(experiment.name, record),
        )
    # A chapter that cannot be drawn, such as from an older version's record, costs only itself.
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return ReportSection(
            experiment.name,
            experiment.title,
            experiment.question,
            source=record_source(experiment.name, record),
            failure=f"it was measured but cannot be drawn ({text}); measure it --again",
        )


def render_figure(drawing: Drawing, schemes: Sequence[ColourScheme] = SCHEMES) -> RenderedFigure:
    """A figure drawn in its dresses."""
    svg: dict[ColourScheme, str] = {
        scheme: render_svg(drawing.draw, name=drawing.name, scheme=scheme) for scheme in schemes
    }
    return RenderedFigure(drawing.name, drawing.caption, svg)


def record_source(name: str, record: Mapping[str, object]) -> RecordSource:
    """What a record says of itself."""
    machine, settings, versions, command = (
        record[key] for key in ("machine", "settings", "versions", "command")
    )
    assert isinstance(machine, dict)
    assert isinstance(settings, dict)
    assert isinstance(versions, dict)
    assert isinstance(command, list)
    memory_mib = machine.get("memory_mib")
    return RecordSource(
        path=f"records/{name}.json",
        command=" ".join(command),
        when=str(record["when"]),
        commit=str(record["commit"]),
        machine=f"{machine['cores']} cores of {machine['processor']}"
        + (f", {memory_mib / 1024:.0f} GiB" if memory_mib else "")
        + ("" if machine["device"] == "cpu" else f", on {machine['device']}"),
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        seconds=float(str(record["seconds"])),
        model=str(settings["model"]),
        items=int(str(settings["items"])),
        prompts=int(str(settings["prompts"])),
    )


def render_page(sections: Sequence[ReportSection]) -> str:
    """HTML with everything inside: no script, no network, no other file."""
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


def _as_finding(finding: Finding | str) -> Finding:
    return finding if isinstance(finding, Finding) else Finding(finding)
