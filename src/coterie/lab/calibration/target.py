"""The target of a calibration, and the estimates that are compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from coterie.errors import ConfigError
from coterie.keys import Key
from coterie.specs import Bounds

TargetKind = Literal["experts", "mass", "loss", "drop", "bits"]
VALUE_FORMAT = "{:.4g}"


@dataclass(frozen=True)
class Estimate:
    """The measured value of a policy, with its 95 % interval over ``n`` prompts."""

    value: Annotated[float, Key("value")]
    interval: Annotated[tuple[float, float], Key("interval")]
    n: Annotated[int, Key("n")]
    # Unique experts a layer in the same run.
    experts: Annotated[float | None, Key("experts")] = None

    def format(self) -> tuple[str, str]:
        """The value and its interval, as text."""
        low, high = self.interval
        return f"{self.value:.4g}", f"{low:.4g} to {high:.4g}"


@dataclass(frozen=True)
class TargetKindSpec:
    """One kind of target: an upper or a lower bound on a quantity."""

    valid_range: Bounds
    is_upper_bound: bool
    description: str
    measured_on: str


DECODING = "decoding to the end under each policy"
VANILLA_FORWARDS = "the inputs of vanilla's decoding forwards"
TARGET_KIND_SPECS: dict[TargetKind, TargetKindSpec] = {
    "experts": TargetKindSpec(Bounds(gt=0), True, "unique experts a layer", DECODING),
    "mass": TargetKindSpec(Bounds(gt=0, le=1), False, "vote mass kept", VANILLA_FORWARDS),
    "loss": TargetKindSpec(Bounds(ge=0), True, "reconstruction loss", VANILLA_FORWARDS),
    "drop": TargetKindSpec(Bounds(ge=0, le=1), True, "accuracy drop", DECODING),
    "bits": TargetKindSpec(Bounds(ge=0), True, "rise of the bits", "masked text under each policy"),
}


@dataclass(frozen=True)
class Target:
    """A bound that a policy has to meet. ``confident``: its 95 % interval must meet it too.

    ``mass`` is a lower bound, all others are upper bounds: ``drop`` is one of accuracy, and
    ``bits`` the share by which the bits of text rise.
    """

    kind: TargetKind
    value: float
    confident: bool = False

    @staticmethod
    def parse(text: str, *, confident: bool = False) -> Target:
        """A spec such as ``experts=38`` or ``bits=+1%``.

        Raises ConfigError for another kind or a bad value.
        """
        name, equals, value_text = (part.strip() for part in text.partition("="))
        kind: TargetKind | None = next((kind for kind in TARGET_KIND_SPECS if kind == name), None)
        if kind is None or not equals:
            known = ", ".join(f"{kind}=.." for kind in TARGET_KIND_SPECS)
            raise ConfigError(f"unknown target {text!r}; known: {known}")
        try:
            value = float(value_text.removesuffix("%")) / (100 if value_text[-1:] == "%" else 1)
        except ValueError:
            raise ConfigError(f"target {kind} must be a number, not {value_text!r}") from None
        valid_range = TARGET_KIND_SPECS[kind].valid_range
        if value not in valid_range:
            raise ConfigError(f"target {kind} must be {valid_range}, not {value_text}")
        return Target(kind, value, confident)

    @property
    def spec(self) -> TargetKindSpec:
        return TARGET_KIND_SPECS[self.kind]

    @property
    def met_by_fewer_experts(self) -> bool:
        """Whether policies with fewer experts are those that meet it."""
        return self.kind == "experts"

    def is_met(self, estimate: Estimate) -> bool:
        low, high = estimate.interval if self.confident else (estimate.value, estimate.value)
        return high <= self.value if self.spec.is_upper_bound else low >= self.value

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"
