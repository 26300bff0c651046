"""What a part of the measurements hands back."""

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
    """One number that is judged: at least (or, ``most``: at most) its target, where it has one.

    With ``must`` it is a matter of right and wrong: to miss it is to fail.
    """

    name: str
    value: float
    target: float | None = None
    most: bool = False
    must: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.most else self.value >= self.target

    def document(self) -> dict[str, object]:
        return {**vars(self), "met": self.met}


@dataclass(frozen=True)
class Found:
    """Times, what was counted or compared, and the numbers that matter.

    ``keep`` is called as these come in: whoever is stopped has left behind what there was.
    """

    measures: list[Measurement] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what was tried and raised
    keep: Callable[[Found], object] = lambda found: None

    def took(self, name: str, microseconds: list[float], calls: int = 1) -> float:
        """Keep these samples, of so many calls each; their median a call, in microseconds."""
        measure = Measurement(name, "us", tuple(sample / calls for sample in microseconds))
        self.measures.append(measure)
        self.keep(self)
        return measure.median

    def judge(self, figure: Figure) -> None:
        self.figures.append(figure)
        self.keep(self)

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """What breaks in here is a failure that is told of; what comes after it goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.broken.append(name)
            self.facts[f"failed: {name}"] = f"{type(error).__name__}: {error}"[:2000]
            self.keep(self)

    @property
    def wrong(self) -> list[str]:
        """What broke, and what must be right and is not."""
        return self.broken + [
            figure.name for figure in self.figures if figure.must and not figure.met
        ]

    def document(self) -> Mapping[str, object]:
        figures = [figure.document() for figure in self.figures]
        document = spelled({**self.facts, "figures": figures})
        assert isinstance(document, dict)
        return document


def spelled(value: object) -> object:
    """The same with numbers that are none in words, for JSON has no others."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: spelled(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [spelled(one) for one in value]
    return value
