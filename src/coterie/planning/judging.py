"""Runs beside what a replay's clock says of them, its rates learnt from others that took turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from coterie.keys import to_json
from coterie.planning.learning import Timed, learnt, off_by
from coterie.planning.machine import Machine, typed


@dataclass(frozen=True)
class Foretold:
    """A run: seconds of a forward as it was and as it was foretold; ``taught``: the rates were
    learnt from it."""

    name: str
    taught: bool
    seconds: float
    told: float

    @property
    def off_by(self) -> float:
        """A share of what it was; above 0 where it was faster than foretold."""
        return self.told / self.seconds - 1

    def document(self) -> dict[str, object]:
        return {
            "run": self.name,
            "rates_learnt_from_it": self.taught,
            "ms": 1e3 * self.seconds,
            "foretold_ms": 1e3 * self.told,
            "off_by": self.off_by,
        }


@dataclass(frozen=True)
class Judgement:
    """The rates that were learnt, and all runs."""

    machine: Machine
    runs: tuple[Foretold, ...]

    @property
    def held_out(self) -> tuple[float, ...]:
        """How far off the others were, without their signs."""
        return tuple(abs(run.off_by) for run in self.runs if not run.taught)

    def document(self) -> dict[str, object]:
        return {
            "machine": {**to_json(self.machine), "as_typed": typed(self.machine)},
            "worst": max(self.held_out),
            "median": median(self.held_out),
            "runs": [run.document() for run in self.runs],
        }


def judge(runs: Mapping[str, Timed], teachers: Collection[str], size: int) -> Judgement:
    """Learn from the ``teachers`` among these runs, and foretell all; experts weigh ``size``."""
    machine = learnt([runs[name] for name in teachers], size)
    found = []
    for name, run in runs.items():
        taken = float(run.seconds.mean())
        told = taken * (1 + off_by(machine, run, size))
        found.append(Foretold(name, name in teachers, taken, told))
    return Judgement(machine, tuple(found))


def together(runs: Sequence[Timed]) -> Timed:
    """One after the other."""
    used, loads, seconds = (
        np.concatenate([getattr(run, name) for run in runs])
        for name in ("used", "loads", "seconds")
    )
    return Timed(used, loads, seconds)
