"""The study: chapter after chapter, each measured once, kept as a record, drawn again at will."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from coterie.engine.engine import Engine
from coterie.evals.fingerprint import fingerprint
from coterie.evals.task import Task
from coterie.keys import Key, to_json
from coterie.naming import CoterieError
from coterie.results import record, write_record
from coterie.routing import respell_all
from coterie.study.accuracy import ACCURACY, SIZE
from coterie.study.beyond import BEYOND
from coterie.study.blocks import Blocks
from coterie.study.breakdown import Parts
from coterie.study.chapter import Chapter
from coterie.study.experts import Experts
from coterie.study.explosion import Explosion
from coterie.study.foretelling import Foretelling
from coterie.study.importance import Importance
from coterie.study.lab import Lab
from coterie.study.latency import Latency
from coterie.study.maps import Maps
from coterie.study.narrow import ExpertsPerToken
from coterie.study.reconstruction import Reconstruction
from coterie.study.remembering import Remembering
from coterie.study.report import Section, page, section
from coterie.study.roofline import Roofline
from coterie.study.selection import Selection
from coterie.study.speed import Forwards, Speed
from coterie.study.steps import Steps
from coterie.study.table import TableOne
from coterie.study.tradeoff import Tradeoff
from coterie.study.variants import CONTROL, MASS, PROTECTION, VOTERS, VOTES
from coterie.study.votes import Votes

REPORT = "report.html"


@dataclass(frozen=True)
class Effort:
    """``items``: questions for each policy; ``prompts``: where single forwards are watched."""

    items: Annotated[int, Key("items")] = 500
    prompts: Annotated[int, Key("prompts")] = 32
    seed: Annotated[int, Key("seed")] = 1


class Watch(Protocol):
    """Somebody who looks on while a study runs."""

    def began(self, chapter: Chapter, wanted: Sequence[Chapter]) -> None:
        """One of the ``wanted``, which come in their order."""
        ...

    def moved(self, share: float, doing: str) -> None:
        """How far the chapter is, 0 .. 1."""
        ...

    def ended(self, done: Done) -> None: ...


@dataclass(frozen=True)
class Done:
    """What became of one chapter; ``failure`` says why there is no record, or no drawing of it."""

    chapter: Chapter
    record: Mapping[str, object] | None = None
    measured: bool = False  # now, and not before
    failure: str | None = None


def study(
    engine: Engine,
    tasks: Sequence[Task],
    folder: Path,
    *,
    effort: Effort,
    watch: Watch,
    chapters: Mapping[str, Chapter] | None = None,
    names: Sequence[str] = (),
    again: Collection[str] = (),
    command: Sequence[str] = (),
) -> list[Section]:
    """Measures what has no record yet, draws everything, writes ``report.html``.

    Only the chapters in ``names``, where there are any: of the others, those with a record stand
    in the report too. ``again`` names chapters that are measured although their record is there.
    A chapter that fails tells why in its section, and the others go on. Stopped and called again,
    a study goes on where it was.
    """
    among = CHAPTERS if chapters is None else chapters
    wanted = chosen([*names, *again] if names else [], among)
    chosen(list(again), among)
    settings = settings_of(engine, tasks, effort)
    lab = Lab(
        engine=engine,
        tasks=[Remembering(task) for task in tasks],
        folder=folder,
        items=effort.items,
        prompts=effort.prompts,
        seed=effort.seed,
        tell=watch.moved,
        answers=folder / "items" / digest(settings),
    )
    sections = []
    for chapter in among.values():
        if chapter not in wanted:
            kept = _kept(folder / "records", chapter.name, settings)
            sections += [] if kept is None else [section(chapter, kept)]
            continue
        watch.began(chapter, wanted)
        fresh = replace(lab, read={})
        done = _chapter(fresh, chapter, settings, command, again=chapter.name in again)
        sections.append(section(chapter, done.record, done.failure))
        watch.ended(replace(done, failure=sections[-1].failure))
    write_report(folder, sections)
    return sections


def write_report(folder: Path, sections: Sequence[Section]) -> Path:
    """The page, and every figure of it as files beside it."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for figure in (figure for one in sections for figure in one.figures):
        for scheme, svg in figure.svg.items():
            (figures / f"{figure.name}-{scheme}.svg").write_text(svg + "\n", encoding="utf-8")
    path = folder / REPORT
    path.write_text(page(sections), encoding="utf-8")
    return path


def chosen(names: Sequence[str], among: Mapping[str, Chapter]) -> list[Chapter]:
    """The chapters of these names, in the study's order; all where none is named."""
    unknown = [name for name in names if name not in among]
    if unknown:
        raise CoterieError(f"unknown chapter {unknown[0]!r}; known: {', '.join(among)}")
    return [chapter for name, chapter in among.items() if not names or name in names]


def settings_of(engine: Engine, tasks: Sequence[Task], effort: Effort) -> dict[str, object]:
    """What two measurements must agree in to be the same, as JSON values."""
    model = engine.model
    if model.folder is None:
        raise CoterieError(f"{model.name}: a model without a folder cannot be known again")
    # Only where it says something: records from before it was said still stand.
    form = model.spec.expert_format
    few = {} if form is None else {"experts": str(form)}
    return {
        "model": model.name,
        **few,
        "fingerprint": fingerprint(model.folder),
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "device": model.transformer.device.type,
        "generation": engine.generation.document(),
        "tasks": {task.name: dict(task.settings()) for task in tasks},
        **to_json(effort),
    }


def digest(settings: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _chapter(
    lab: Lab,
    chapter: Chapter,
    settings: Mapping[str, object],
    command: Sequence[str],
    *,
    again: bool,
) -> Done:
    """The chapter with its record, which is measured where none fits."""
    folder = lab.folder / "records"
    kept = None if again else _kept(folder, chapter.name, settings)
    if kept is not None:
        return Done(chapter, kept)
    began = time.perf_counter()
    try:
        facts = chapter.measure(lab)
        content = {
            **record(chapter.name, command, [], facts=facts, device=str(settings["device"])),
            "about": chapter.title,
            "seconds": round(time.perf_counter() - began, 1),
            "settings": settings,
            "read": lab.read,
        }
        path = write_record(folder, content)
    # A chapter may fail in any way it likes; the others shall not.
    except Exception as error:
        return Done(chapter, failure=_said(error))
    return Done(chapter, json.loads(path.read_text(encoding="utf-8")), measured=True)


def _kept(folder: Path, name: str, settings: Mapping[str, object]) -> Mapping[str, object] | None:
    """The record of a chapter, if it was measured just so and from records that still stand."""
    content = _read(folder / f"{name}.json")
    if content is None or content.get("settings") != json.loads(json.dumps(settings)):
        return None
    read = content.get("read")
    others = read.items() if isinstance(read, dict) else ()
    for other, when in others:
        source = _read(folder / f"{other}.json")
        if source is None or source.get("when") != when:
            return None
    return content


def _read(path: Path) -> dict[str, object] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return renewed(content) if isinstance(content, dict) else None


def renewed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its policies spelled as they are now; how it was made stays as it was."""
    return respell_all(content, but=("command", "settings"))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, CoterieError) else f"{type(error).__name__}: {error}"


USUAL_SECONDS: Mapping[str, int] = {  # where it is not about half a minute; only a bar asks
    "accuracy": 550,
    "latency-accuracy": 100,
    "block-size": 120,
    "voters": 80,
    "table-1": 5,
    "coreset-size": 5,
    "forwards": 5,
    "experts": 2400,
}

CHAPTERS: dict[str, Chapter] = {
    "explosion": Explosion(),
    "roofline": Roofline(),
    "accuracy": ACCURACY,
    "breakdown": Parts(),
    "latency": Latency(),
    "latency-accuracy": Tradeoff(),  # reads the records of accuracy and latency
    "importance": Importance(),
    "reconstruction": Reconstruction(),
    "selection": Selection(),
    "coreset-size": SIZE,
    "block-size": Blocks(),
    "experts-per-token": ExpertsPerToken(),
    "maps": Maps(),
    "table-1": TableOne(),
    "random-control": CONTROL,
    "votes": VOTES,
    "voters": VOTERS,
    "protection": PROTECTION,
    "mass": MASS,
    "votes-fidelity": Votes(),
    "foretelling": Foretelling(),  # reads the record of accuracy
    "steps": Steps(),
    "beyond": BEYOND,
    "forwards": Forwards(),
    "speed": Speed(),
    "experts": Experts(),
}
