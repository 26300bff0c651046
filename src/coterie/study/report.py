"""The report: what every chapter found, on one page that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from coterie.figures.style import Scheme, drawn
from coterie.study.chapter import Chapter, Drawing, Finding, Table, Verdict

SCHEMES: tuple[Scheme, ...] = ("light", "dark")
MARKS: Mapping[Verdict, str] = {"holds": "✓", "does not hold": "✗", "cannot be told here": "?"}
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Shown:
    """A figure in both dresses, as SVG text."""

    name: str
    caption: str
    svg: Mapping[Scheme, str]


@dataclass(frozen=True)
class Source:
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
class Section:
    """One chapter of the page; where it has a ``failure``, what could be shown is still there."""

    name: str
    title: str
    question: str
    figures: tuple[Shown, ...] = ()
    tables: tuple[Table, ...] = ()
    findings: tuple[Finding, ...] = ()
    source: Source | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Claim:
    """Something the paper says, the chapter that looked, and what each finding came to."""

    text: str
    section: Section
    verdicts: tuple[Verdict, ...]

    @property
    def told(self) -> list[tuple[Verdict, str]]:
        """Each verdict once, in words, with how often it was found where they differ."""
        counts = Counter(self.verdicts)
        several = len(counts) > 1
        return [(v, f"{v} ({counts[v]})" if several else v) for v in MARKS if counts[v]]


def claims(sections: Sequence[Section]) -> list[Claim]:
    """Every claim once for each chapter, in the order of the page."""
    found: dict[tuple[str, str], Claim] = {}
    for one in sections:
        for finding in one.findings:
            if finding.verdict is not None:
                key = one.name, finding.claim
                known = found[key].verdicts if key in found else ()
                found[key] = Claim(finding.claim, one, (*known, finding.verdict))
    return list(found.values())


def section(
    chapter: Chapter,
    record: Mapping[str, object] | None,
    failure: str | None = None,
    *,
    schemes: Sequence[Scheme] = SCHEMES,
) -> Section:
    """The chapter as it is told and drawn from its record; without ``schemes`` it is only told."""
    bare = Section(chapter.name, chapter.title, chapter.question, failure=failure)
    if record is None:
        return bare
    facts = record["facts"]
    assert isinstance(facts, dict)
    try:
        return Section(
            name=chapter.name,
            title=chapter.title,
            question=chapter.question,
            figures=tuple(shown(drawing, schemes) for drawing in chapter.drawings(facts)),
            tables=tuple(chapter.tables(facts)),
            findings=tuple(map(_finding, chapter.findings(facts))),
            source=source(chapter.name, record),
        )
    # A chapter that cannot be drawn, such as from an older version's record, costs only itself.
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return Section(
            chapter.name,
            chapter.title,
            chapter.question,
            source=source(chapter.name, record),
            failure=f"it was measured but cannot be drawn ({said}); measure it --again",
        )


def shown(drawing: Drawing, schemes: Sequence[Scheme] = SCHEMES) -> Shown:
    """A figure drawn in its dresses."""
    svg: dict[Scheme, str] = {
        scheme: drawn(drawing.draw, name=drawing.name, scheme=scheme) for scheme in schemes
    }
    return Shown(drawing.name, drawing.caption, svg)


def source(name: str, record: Mapping[str, object]) -> Source:
    """What a record says of itself."""
    machine, settings, versions, command = (
        record[key] for key in ("machine", "settings", "versions", "command")
    )
    assert isinstance(machine, dict)
    assert isinstance(settings, dict)
    assert isinstance(versions, dict)
    assert isinstance(command, list)
    memory = machine.get("memory_mib")
    return Source(
        path=f"records/{name}.json",
        command=" ".join(command),
        when=str(record["when"]),
        commit=str(record["commit"]),
        machine=f"{machine['cores']} cores of {machine['processor']}"
        + (f", {memory / 1024:.0f} GiB" if memory else "")
        + ("" if machine["device"] == "cpu" else f", on {machine['device']}"),
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        seconds=float(str(record["seconds"])),
        model=str(settings["model"]),
        items=int(str(settings["items"])),
        prompts=int(str(settings["prompts"])),
    )


def page(sections: Sequence[Section]) -> str:
    """HTML with everything inside: no script, no network, no other file."""
    room = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sources = [one.source for one in sections if one.source is not None]
    return room.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        sections=sections,
        schemes=SCHEMES,
        marks=MARKS,
        model=sources[0].model if sources else "nothing yet",
        sources=sources,
        claims=claims(sections),
        failures=[one for one in sections if one.failure is not None],
    )


def _finding(found: Finding | str) -> Finding:
    return found if isinstance(found, Finding) else Finding(found)
