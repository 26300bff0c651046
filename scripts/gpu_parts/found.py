"""What a part of the measurements hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coterie.results import Measure


@dataclass(frozen=True)
class Figure:
    """One number that is judged: at least (or, ``most``: at most) its target, where it has one."""

    name: str
    value: float
    target: float | None = None
    most: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.most else self.value >= self.target

    def document(self) -> dict[str, object]:
        return {**vars(self), "met": self.met}


@dataclass(frozen=True)
class Found:
    """Times, what was counted or compared, and the numbers that matter."""

    measures: list[Measure] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    def took(self, name: str, microseconds: list[float], calls: int = 1) -> float:
        """Keep these samples, of so many calls each; their median a call, in microseconds."""
        measure = Measure(name, "us", tuple(sample / calls for sample in microseconds))
        self.measures.append(measure)
        return measure.median

    def document(self) -> Mapping[str, object]:
        return {**self.facts, "figures": [figure.document() for figure in self.figures]}
