"""What a policy shall meet, and how a reading is held against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coterie.errors import CoterieError
from coterie.specs import Bounds

TargetKind = Literal["experts", "mass", "loss", "drop"]


@dataclass(frozen=True)
class Estimate:
    """What one policy came to: a value with its 95 % interval over ``n`` prompts.

    ``experts`` is its traffic, read in the same run where the value itself is another; None where
    it was not looked at.
    """

    value: float
    interval: tuple[float, float]
    n: int
    experts: float | None = None


@dataclass(frozen=True)
class TargetKindSpec:
    """One kind of target. ``most``: a reading meets it from below, else from above."""

    valid_range: Bounds
    is_upper_bound: bool
    description: str
    value_format: str  # one value, for people


TARGET_KIND_SPECS: dict[TargetKind, TargetKindSpec] = {
    "experts": TargetKindSpec(Bounds(gt=0), True, "unique experts a layer", "{:.4g}"),
    "mass": TargetKindSpec(Bounds(gt=0, le=1), False, "vote mass kept", "{:.4g}"),
    "loss": TargetKindSpec(Bounds(ge=0), True, "reconstruction loss", "{:.4g}"),
    "drop": TargetKindSpec(Bounds(ge=0, le=1), True, "accuracy drop", "{:.4g}"),
}


@dataclass(frozen=True)
class Target:
    """``experts`` at most, ``mass`` at least, ``loss`` at most, ``drop`` of accuracy at most.

    ``sure``: the far end of the interval must meet it too.
    """

    kind: TargetKind
    value: float
    confident: bool = False

    @staticmethod
    def parse(text: str, *, confident: bool = False) -> Target:
        """``experts=38``; raises CoterieError for other words and for values out of range."""
        name, equals, value_text = (part.strip() for part in text.partition("="))
        kind: TargetKind | None = next((kind for kind in TARGET_KIND_SPECS if kind == name), None)
        if kind is None or not equals:
            known = ", ".join(f"{kind}=.." for kind in TARGET_KIND_SPECS)
            raise CoterieError(f"unknown target {text!r}; known: {known}")
        try:
            value = float(value_text)
        except ValueError:
            raise CoterieError(f"target {kind} must be a number, not {value_text!r}") from None
        if value not in TARGET_KIND_SPECS[kind].valid_range:
            raise CoterieError(
                f"target {kind} must be {TARGET_KIND_SPECS[kind].valid_range}, not {value_text}"
            )
        return Target(kind, value, confident)

    @property
    def spec(self) -> TargetKindSpec:
        return TARGET_KIND_SPECS[self.kind]

    @property
    def met_by_fewer_experts(self) -> bool:
        """Whether the more thrifty policies are those that meet it: only fewer experts are."""
        return self.kind == "experts"

    def is_met(self, estimate: Estimate) -> bool:
        low, high = estimate.interval if self.confident else (estimate.value, estimate.value)
        return high <= self.value if self.spec.is_upper_bound else low >= self.value

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"
