"""What a policy shall meet, and how a reading is held against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coterie.naming import CoterieError
from coterie.spelling import Within

Kind = Literal["experts", "mass", "loss", "drop"]


@dataclass(frozen=True)
class Reading:
    """What one policy came to: a value with its 95 % interval over ``n`` prompts.

    ``experts`` is its traffic, read in the same run where the value itself is another; None where
    it was not looked at.
    """

    value: float
    interval: tuple[float, float]
    n: int
    experts: float | None = None


@dataclass(frozen=True)
class Meaning:
    """One kind of target. ``most``: a reading meets it from below, else from above."""

    within: Within
    most: bool
    noun: str
    told: str  # one value, for people


MEANINGS: dict[Kind, Meaning] = {
    "experts": Meaning(Within(above=0), True, "unique experts a layer", "{:.4g}"),
    "mass": Meaning(Within(above=0, most=1), False, "vote mass kept", "{:.4g}"),
    "loss": Meaning(Within(least=0), True, "reconstruction loss", "{:.4g}"),
    "drop": Meaning(Within(least=0, most=1), True, "accuracy drop", "{:.4g}"),
}


@dataclass(frozen=True)
class Target:
    """``experts`` at most, ``mass`` at least, ``loss`` at most, ``drop`` of accuracy at most.

    ``sure``: the far end of the interval must meet it too.
    """

    kind: Kind
    value: float
    sure: bool = False

    @staticmethod
    def of(text: str, *, sure: bool = False) -> Target:
        """``experts=38``; raises CoterieError for other words and for values out of range."""
        name, equals, said = (part.strip() for part in text.partition("="))
        kind: Kind | None = next((kind for kind in MEANINGS if kind == name), None)
        if kind is None or not equals:
            known = ", ".join(f"{kind}=.." for kind in MEANINGS)
            raise CoterieError(f"unknown target {text!r}; known: {known}")
        try:
            value = float(said)
        except ValueError:
            raise CoterieError(f"target {kind} must be a number, not {said!r}") from None
        if value not in MEANINGS[kind].within:
            raise CoterieError(f"target {kind} must be {MEANINGS[kind].within}, not {said}")
        return Target(kind, value, sure)

    @property
    def meaning(self) -> Meaning:
        return MEANINGS[self.kind]

    @property
    def grows_with_thrift(self) -> bool:
        """Whether the more thrifty policies are those that meet it: only fewer experts are."""
        return self.kind == "experts"

    def met(self, reading: Reading) -> bool:
        low, high = reading.interval if self.sure else (reading.value, reading.value)
        return high <= self.value if self.meaning.most else low >= self.value

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"
