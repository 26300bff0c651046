"""What a part of the GPU suite reports: times, facts and figures with targets."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from coterie.lab.records import Measurement


@dataclass(frozen=True)
class Figure:
    """A number with an optional target: at least it or, with ``at_most``, at most it.

    A missed ``required`` figure is a failure; others are only reported.
    """

    name: str
    value: float
    target: float | None = None
    at_most: bool = False
    required: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class PartReport:
    """Times, facts and figures of one part; ``on_change`` is called with each new one.

    So a part that is stopped leaves a record of what it measured before.
    """

    measures: list[Measurement] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # attempts that raised
    on_change: Callable[[PartReport], object] = lambda report: None

    def add_times(self, name: str, microseconds: list[float], calls: int = 1) -> float:
        """Add samples of so many calls each; returns the median of a call in microseconds."""
        measure = Measurement(name, "us", tuple(sample / calls for sample in microseconds))
        self.measures.append(measure)
        self.on_change(self)
        return measure.median

    def add_figure(
        self, name: str, value: float, target: float | None = None, **limits: bool
    ) -> None:
        """Add a number; ``limits`` are ``at_most`` and ``required`` of the figure."""
        self.figures.append(Figure(name, value, target, **limits))
        self.on_change(self)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """An exception inside is recorded as a failure, and the part goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.errors.append(name)
            self.facts[f"failed: {name}"] = f"{type(error).__name__}: {error}"[:2000]
            self.on_change(self)

    @property
    def failures(self) -> list[str]:
        """Attempts that raised, and required figures that are missed."""
        return self.errors + [f.name for f in self.figures if f.required and not f.met]

    def to_dict(self) -> Mapping[str, object]:
        figures = [{**vars(figure), "met": figure.met} for figure in self.figures]
        return {str(k): _finite(v) for k, v in {**self.facts, "figures": figures}.items()}


def _finite(value: object) -> object:
    """The same with infinite and undefined numbers as text, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
