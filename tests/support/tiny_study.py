"""A small study for tests: fake experiments, a tiny engine, and results by digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from tiny_task import make_quiz

import coterie
from coterie.engine.engine import Engine
from coterie.lab import plotting
from coterie.lab.study.experiment import (
    Drawing,
    Entry,
    Experiment,
    ExperimentText,
    Finding,
    Part,
    StudyContext,
    Table,
)
from coterie.lab.study.report import ReportSection
from coterie.lab.study.results import VariantResult
from coterie.lab.study.study import ExperimentOutcome, StudyConfig, run_study
from coterie.testing import write_checkpoint

ROOT = Path(__file__).parents[3]
SMALL = StudyConfig(items=6, prompts=2, seed=1)
QUIZ = make_quiz(count=6, tokens=8)
HOSTILE = '<script src="http://evil.example/x.js"></script> & "quotes"'


@dataclass(frozen=True)
class Counted(Experiment):
    """An experiment that counts its measurements; it may read another record, or fail."""

    text: ExperimentText
    measured: list[str]
    reads: str = ""
    error: BaseException | None = None
    draws: bool = True

    def measure(self, context: StudyContext) -> Entry:
        context.on_progress(0.5, "counting")
        self.measured.append(self.name)
        if self.error is not None:
            raise self.error
        other = context.record(self.reads) if self.reads else {}
        return {"value": len(self.measured) / 7, "hostile": HOSTILE, "other": other}

    def report(self, record: Entry) -> Iterator[Part]:
        yield Drawing(f"{self.name}-figure", HOSTILE, lambda: self._figure(record))
        yield Table(["what", "value"], [[HOSTILE, f"{record['value']:.3f}"]], "Values", [1])
        yield Finding(f"It is {record['value']:.3f}.", HOSTILE, "does not hold")
        yield HOSTILE

    def _figure(self, record: Entry) -> Figure:
        if not self.draws:
            raise KeyError("line")
        figure, ax = plotting.new_axes("x", str(record["hostile"]))
        ax.plot([0, 1], [0, float(str(record["value"]))], label="a line")
        plotting.add_legend(ax)
        return figure


def drawings_of(experiment: Experiment, record: Entry) -> list[Drawing]:
    return [part for part in experiment.report(record) if isinstance(part, Drawing)]


def tables_of(experiment: Experiment, record: Entry) -> list[Table]:
    return [part for part in experiment.report(record) if isinstance(part, Table)]


def findings_of(experiment: Experiment, record: Entry) -> list[Finding | str]:
    return [part for part in experiment.report(record) if isinstance(part, Finding | str)]


def counted(
    name: str,
    measured: list[str],
    *,
    reads: str = "",
    error: BaseException | None = None,
    draws: bool = True,
) -> Counted:
    text = ExperimentText(name, "A chapter (Fig. 0)", "How often?")
    return Counted(text, measured, reads, error, draws)


@dataclass
class Looking:
    """Remembers what it was shown."""

    done: list[ExperimentOutcome] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)

    def on_experiment_start(self, chapter: Experiment, wanted: Sequence[Experiment]) -> None:
        assert chapter in wanted

    def on_progress(self, share: float, doing: str) -> None:
        assert doing
        self.moves.append(share)

    def on_experiment_end(self, done: ExperimentOutcome) -> None:
        self.done.append(done)


def tiny(folder: Path) -> Engine:
    """A random model with 16 experts and top-4."""
    where = write_checkpoint(folder / "model", "llada2", seed=3)
    return coterie.load(where, unmask="fixed:steps=2", block=8, device="cpu")


def studied(
    engine: Engine, folder: Path, chapters: Sequence[Experiment], **options: object
) -> tuple[list[ReportSection], Looking]:
    watch = Looking()
    known = {chapter.name: chapter for chapter in chapters}
    asked: dict = {"config": SMALL, **options}
    return run_study(engine, [QUIZ], folder, observer=watch, experiments=known, **asked), watch


def lab(folder: Path, items: int = 6) -> StudyContext:
    return StudyContext(tiny(folder), [QUIZ], folder, items, 2, lambda share, doing: None)


def tally(name: str, right: str, experts: float = 10.0) -> VariantResult:
    return VariantResult(name, name, {}, {"quiz": right}, experts, 1.0, 1.0, 1.0, 8.0, 1.0, 0)
