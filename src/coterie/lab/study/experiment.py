"""A chapter of the study: measured once, kept as a record, drawn and told as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from matplotlib.figure import Figure

from coterie.lab.study.context import StudyContext

ExperimentData = Mapping[str, object]  # JSON values, as they come back from the record
Verdict = Literal["holds", "does not hold", "cannot be told here"]


@dataclass(frozen=True)
class Drawing:
    """One figure. ``draw`` makes it anew under the style that is in force (light or dark)."""

    name: str  # the file's, such as "explosion"
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Table:
    """Rows of text under their heads; ``numbers`` are the columns that stand flush right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Finding:
    """What was found, beside the paper's ``claim`` where it makes one, which then has a verdict."""

    text: str
    claim: str = ""
    verdict: Verdict | None = None


class Experiment(Protocol):
    """One question of the study. Everything but ``measure`` works from the record alone."""

    @property
    def name(self) -> str:
        """Of the record's file and the report's anchor: "explosion"."""
        ...

    @property
    def title(self) -> str:
        """With the paper's place: "The expert explosion (Fig. 1a)"."""
        ...

    @property
    def question(self) -> str:
        """What the chapter asks, in a sentence for somebody who has not read the paper."""
        ...

    def measure(self, context: StudyContext) -> ExperimentData:
        """Runs what must be run; ``lab.tell(share done, doing)`` moves the bar."""
        ...

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]: ...

    def tables(self, data: ExperimentData) -> Sequence[Table]: ...

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        """Sentences that say what was found, with the paper's claim beside it: numbers come from
        ``facts``, and so does whether the claim holds."""
        ...
