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
from coterie.checkpoints.journal import atomic_write
from coterie.engine.engine import Engine
from coterie.errors import ConfigError, CoterieError
from coterie.keys import Key, to_json
from coterie.lab.evals.task import Task
from coterie.lab.records import make_record, write_record
from coterie.lab.study.ablations import BEYOND, CONTROL, MASS, PROTECTION, VOTERS, VOTES
from coterie.lab.study.accuracy import ACCURACY, CORESET_SIZE
from coterie.lab.study.blocks import BlockSizeExperiment
from coterie.lab.study.breakdown import BreakdownExperiment
from coterie.lab.study.cached_grading import CachedGradesTask
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Experiment
from coterie.lab.study.expert_cache_report import ExpertCacheExperiment
from coterie.lab.study.experts_per_token import ExpertsPerTokenExperiment
from coterie.lab.study.explosion import ExplosionExperiment
from coterie.lab.study.importance import ImportanceExperiment
from coterie.lab.study.latency import LatencyExperiment
from coterie.lab.study.maps import MapsExperiment
from coterie.lab.study.reconstruction import ReconstructionExperiment
from coterie.lab.study.report import ReportSection, make_section, render_page
from coterie.lab.study.roofline import RooflineExperiment
from coterie.lab.study.selection import SelectionExperiment
from coterie.lab.study.speed import FORWARDS, SpeedExperiment
from coterie.lab.study.table import TABLE_ONE
from coterie.lab.study.tradeoff import TradeoffExperiment
from coterie.routing import update_policies_in_json

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
        tasks=[CachedGradesTask(task) for task in tasks],
        folder=folder,
        num_problems=config.items,
        num_prompts=config.prompts,
        seed=config.seed,
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
                failure = _format_error(error)
        if is_selected or record is not None:
            sections.append(make_section(experiment, record, failure))
        if is_selected:
            observer.on_experiment_end(ExperimentOutcome(is_measured, sections[-1].failure))
    write_report(folder, sections)
    return sections


def write_report(folder: Path, sections: Sequence[ReportSection]) -> Path:
    """Write the page, and its figures as files in ``figures``."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for figure in (figure for section in sections for figure in section.figures):
        for scheme, svg in figure.svg.items():
            atomic_write(figures / f"{figure.name}-{scheme}.svg", f"{svg}\n".encode())
    path = folder / REPORT
    atomic_write(path, render_page(sections).encode())
    return path


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
    # Omitted by default, so that records without this key stay valid.
    expert_format = model.spec.expert_format
    expert_settings = {} if expert_format is None else {"experts": str(expert_format)}
    return {
        "model": model.name,
        **expert_settings,
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
    path = write_record(context.folder / "records", content)
    return json.loads(path.read_text(encoding="utf-8"))


def _read_valid_record(
    folder: Path, name: str, settings: Mapping[str, object]
) -> Mapping[str, Any] | None:
    """The record, if its settings match and the records that it read are unchanged."""
    content = _read_json(folder / f"{name}.json")
    if content is None or content.get("settings") != json.loads(json.dumps(settings)):
        return None
    for other, when in dict(content.get("read") or {}).items():
        source = _read_json(folder / f"{other}.json")
        if source is None or source.get("when") != when:
            return None
    return content


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return update_record(content) if isinstance(content, dict) else None


def update_record(content: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its policies in the current spelling; command and settings are unchanged."""
    return update_policies_in_json(content, skip_keys=("command", "settings"))


def _format_error(error: Exception) -> str:
    return str(error) if isinstance(error, CoterieError) else f"{type(error).__name__}: {error}"


TYPICAL_SECONDS: Mapping[str, int] = {  # for the progress bar; default: half a minute
    "accuracy": 550,
    "latency-accuracy": 100,
    "block-size": 120,
    "voters": 80,
    "table-1": 5,
    "coreset-size": 5,
    "forwards": 5,
    "experts": 2400,
}

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
    "random-control": CONTROL,
    "votes": VOTES,
    "voters": VOTERS,
    "protection": PROTECTION,
    "mass": MASS,
    "beyond": BEYOND,
    "forwards": FORWARDS,
    "speed": SpeedExperiment(),
    "experts": ExpertCacheExperiment(),
}
