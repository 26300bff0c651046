"""The study: experiments that are measured once, stored as records, and rendered at will."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from coterie.checkpoints.fingerprint import fingerprint
from coterie.engine.engine import Engine
from coterie.errors import ConfigError, CoterieError
from coterie.files import atomic_write
from coterie.keys import Key, to_json
from coterie.lab.evals.task import Task
from coterie.lab.records import make_record, write_record
from coterie.lab.study.accuracy import ACCURACY, CORESET_SIZE, TABLE_ONE
from coterie.lab.study.blocks import BlockSizeExperiment
from coterie.lab.study.breakdown import BreakdownExperiment
from coterie.lab.study.comparison import PolicyComparison
from coterie.lab.study.experiment import Experiment, StudyContext, read_record
from coterie.lab.study.expert_cache_report import ExpertCacheExperiment
from coterie.lab.study.experts_per_token import ExpertsPerTokenExperiment
from coterie.lab.study.explosion import ExplosionExperiment
from coterie.lab.study.importance import ImportanceExperiment
from coterie.lab.study.latency import LatencyExperiment, RooflineExperiment
from coterie.lab.study.maps import MapsExperiment
from coterie.lab.study.reconstruction import ReconstructionExperiment
from coterie.lab.study.report import ReportSection, make_section, render_page
from coterie.lab.study.selection import SelectionExperiment
from coterie.lab.study.speed import FORWARDS, SpeedExperiment
from coterie.lab.study.tradeoff import TradeoffExperiment

REPORT = "report.html"


@dataclass(frozen=True)
class StudyConfig:
    """``items`` are problems per policy, ``prompts`` those of experiments on single forwards."""

    items: Annotated[int, Key("items")] = 500
    prompts: Annotated[int, Key("prompts")] = 32
    seed: Annotated[int, Key("seed")] = 1


class StudyObserver(Protocol):
    """Receives the progress of a running study."""

    def on_experiment_start(self, experiment: Experiment, selected: Sequence[Experiment]) -> None:
        """Called before each experiment in ``selected``, in order."""
        ...

    def on_progress(self, share: float, activity: str) -> None:
        """``share`` of the experiment done, 0 .. 1."""
        ...

    def on_experiment_end(self, outcome: ExperimentOutcome) -> None: ...


@dataclass(frozen=True)
class ExperimentOutcome:
    """``failure`` explains a missing record or figure."""

    measured: bool  # in this run; otherwise the record was there
    failure: str | None = None


def run_study(
    engine: Engine,
    tasks: Sequence[Task],
    folder: Path,
    *,
    config: StudyConfig,
    observer: StudyObserver,
    experiments: Mapping[str, Experiment] | None = None,
    names: Sequence[str] = (),
    rerun: Collection[str] = (),
    command: Sequence[str] = (),
) -> list[ReportSection]:
    """Measure experiments without a record, render all of them, and write ``report.html``.

    ``names`` selects experiments (default: all); the report includes every other experiment with a
    valid record. ``rerun`` names experiments to measure again. The section of a failed experiment
    gives the error, and the study continues. An interrupted study resumes at the next call.
    """
    available = EXPERIMENTS if experiments is None else experiments
    selected = select_experiments([*names, *rerun] if names else [], available)
    select_experiments(list(rerun), available)
    settings = settings_of(engine, tasks, config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    context = StudyContext(
        engine=engine,
        tasks=[task.with_cached_grades() for task in tasks],
        folder=folder,
        num_problems=config.items,
        num_prompts=config.prompts,
        on_progress=observer.on_progress,
        answers=folder / "items" / digest,
    )
    sections = []
    for experiment in available.values():
        name, is_selected, failure = experiment.name, experiment in selected, None
        if is_selected:
            observer.on_experiment_start(experiment, selected)
        record = None if name in rerun else _read_valid_record(folder / "records", name, settings)
        is_measured = is_selected and record is None
        if is_measured:
            try:
                record = _measure(replace(context, used_records={}), experiment, settings, command)
            # No failure of one experiment may stop the study.
            except Exception as error:
                kind = "" if isinstance(error, CoterieError) else f"{type(error).__name__}: "
                failure = f"{kind}{error}"
        if is_selected or record is not None:
            sections.append(make_section(experiment, record, failure))
        if is_selected:
            observer.on_experiment_end(ExperimentOutcome(is_measured, sections[-1].failure))
    write_report(folder, sections)
    return sections


def write_report(folder: Path, sections: Sequence[ReportSection]) -> None:
    """Write the page, and its figures as files in ``figures``."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for figure in (figure for section in sections for figure in section.figures):
        for scheme, svg in figure.svg.items():
            atomic_write(figures / f"{figure.name}-{scheme}.svg", f"{svg}\n".encode())
    atomic_write(folder / REPORT, render_page(sections).encode())


def select_experiments(
    names: Sequence[str], experiments: Mapping[str, Experiment]
) -> list[Experiment]:
    """The experiments of these names, in the study's order; all where ``names`` is empty."""
    unknown = [name for name in names if name not in experiments]
    if unknown:
        raise ConfigError(f"unknown experiment {unknown[0]!r}; known: {', '.join(experiments)}")
    return [experiment for name, experiment in experiments.items() if not names or name in names]


def settings_of(engine: Engine, tasks: Sequence[Task], config: StudyConfig) -> dict[str, object]:
    """The settings that identify a measurement, as JSON values."""
    model = engine.model
    if model.folder is None:
        raise ConfigError(f"{model.name}: a model without a folder has no fingerprint")
    # Omitted by default, so that records without these keys stay valid.
    formats = {"experts": model.spec.expert_format, "dense": model.spec.dense_format}
    format_settings = {name: str(form) for name, form in formats.items() if form is not None}
    return {
        "model": model.name,
        **format_settings,
        "fingerprint": fingerprint(model.folder),
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "device": model.transformer.device.type,
        "generation": engine.generation.document(),
        "tasks": {task.name: dict(task.settings()) for task in tasks},
        **to_json(config),
    }


def _measure(
    context: StudyContext,
    experiment: Experiment,
    settings: Mapping[str, object],
    command: Sequence[str],
) -> Mapping[str, Any]:
    """The experiment's new record, as it was written."""
    start = time.perf_counter()
    data = experiment.measure(context)
    content = {
        **make_record(experiment.name, command, [], facts=data, device=str(settings["device"])),
        "about": experiment.text.title,
        "seconds": round(time.perf_counter() - start, 1),
        "settings": settings,
        "read": context.used_records,
    }
    write_record(context.folder / "records", content)
    return json.loads(json.dumps(content))


def _read_valid_record(
    folder: Path, name: str, settings: Mapping[str, object]
) -> Mapping[str, Any] | None:
    """The record, if its settings match and the records that it read are unchanged."""
    record = read_record(folder, name)
    if record is None or record.get("settings") != json.loads(json.dumps(settings)):
        return None
    seconds, times = record.get("seconds"), record.get("read") or {}
    if not isinstance(seconds, int | float) or not isinstance(times, dict):
        return None
    sources = {other: read_record(folder, other) or {} for other in times}
    is_current = all(sources[other].get("when") == when for other, when in times.items())
    return record if is_current else None


COMPARISONS = ("random-control", "votes", "voters", "protection", "mass", "beyond")
EXPERIMENTS: dict[str, Experiment] = {
    "explosion": ExplosionExperiment(),
    "roofline": RooflineExperiment(),
    "accuracy": ACCURACY,
    "breakdown": BreakdownExperiment(),
    "latency": LatencyExperiment(),
    "latency-accuracy": TradeoffExperiment(),  # reads the records `accuracy` and `latency`
    "importance": ImportanceExperiment(),
    "reconstruction": ReconstructionExperiment(),
    "selection": SelectionExperiment(),
    "coreset-size": CORESET_SIZE,
    "block-size": BlockSizeExperiment(),
    "experts-per-token": ExpertsPerTokenExperiment(),
    "maps": MapsExperiment(),
    "table-1": TABLE_ONE,
    **{name: PolicyComparison.load(name) for name in COMPARISONS},
    "forwards": FORWARDS,
    "speed": SpeedExperiment(),
    "experts": ExpertCacheExperiment(),
}
