"""Two precisions asked for: where coarse experts are, who is fine, and how both share memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

from coterie.errors import CoterieError
from coterie.specs import (
    Bounds,
    PositiveFraction,
    PositiveInt,
    check_options,
    format_spec,
    parse_spec,
)

OpenShare = Annotated[float, Bounds(ge=0.01, le=0.99)]  # something of it, but not all


class PrecisionPolicy(Protocol):
    """Who is fine. Experts that have a place in neither precision come coarse when needed."""

    @property
    def share(self) -> float:
        """Of the memory for experts, the part for fine ones; more where that leaves no coarse
        expert out."""
        ...

    @property
    def most(self) -> int:
        """Who become fine after a forward of a layer, at most."""
        ...

    @property
    def mass(self) -> float:
        """Share of a forward's votes whose experts become fine before they serve it."""
        ...


@dataclass(frozen=True)
class PromoteUsed:
    """The most voted lately: after each forward of a layer at most so many become fine."""

    most: PositiveInt = 2
    share: OpenShare = 0.5

    __post_init__ = check_options

    @property
    def mass(self) -> float:
        return 0.0


@dataclass(frozen=True)
class VoteMassPrecision:
    """Those who hold this share of a forward's votes are fine in it: nobody loses more than the
    others' votes, and a forward waits for whole experts too."""

    mass: PositiveFraction = 0.7
    share: OpenShare = 0.5

    __post_init__ = check_options

    @property
    def most(self) -> int:
        return 0


@dataclass(frozen=True)
class StaticVotes:
    """The most voted of earlier runs stay fine, all others coarse."""

    share: OpenShare = 0.5

    __post_init__ = check_options

    @property
    def most(self) -> int:
        return 0

    @property
    def mass(self) -> float:
        return 0.0


PRECISION_POLICIES: dict[str, type[PrecisionPolicy]] = {
    "promote": PromoteUsed,
    "vote-mass": VoteMassPrecision,
    "static": StaticVotes,
}
SAVED_NAMES = {"promote": "upgrades", "vote-mass": "ballot", "static": "votes"}  # in run.json


@dataclass(frozen=True)
class LowPrecisionExperts:
    """A second folder of the same model, its experts in fewer bits, and who is not served so."""

    folder: str | Path
    precision_policy: PrecisionPolicy = field(default_factory=PromoteUsed)

    @staticmethod
    def parse(folder: str, precision_policy: str | None = None) -> LowPrecisionExperts:
        """From "static:share=0.3"; promote by default."""
        if precision_policy is None:
            return LowPrecisionExperts(folder)
        return LowPrecisionExperts(
            folder, parse_spec(precision_policy, PRECISION_POLICIES, "precision policy")
        )

    def to_dict(self) -> dict[str, object]:
        """As JSON, under the keys of saved runs."""
        spec = format_spec(self.precision_policy, PRECISION_POLICIES)
        name, colon, options = spec.partition(":")
        return {"coarse": str(self.folder), "placement": f"{SAVED_NAMES[name]}{colon}{options}"}


@dataclass(frozen=True)
class PrecisionSplit:
    """Of each layer, places for finer experts and slots for coarse ones."""

    high_slots: int
    low_slots: int

    @staticmethod
    def of(
        layer_bytes: int, share: float, *, experts: int, high_bytes: int, low_bytes: int
    ) -> PrecisionSplit:
        """Of ``room`` bytes for a layer, where an expert weighs ``fine`` or ``coarse``.

        Where all experts are there in one precision or the other, what is left over makes more of
        them fine. Raises CoterieError where one of the two has no place.
        """
        if layer_bytes >= experts * high_bytes:
            raise CoterieError("--coarse has no effect: all experts fit into memory as they are")
        high_slots = int(share * layer_bytes) // high_bytes
        low_slots = (layer_bytes - high_slots * high_bytes) // low_bytes
        if high_slots + low_slots > experts:
            high_slots = (layer_bytes - experts * low_bytes) // (high_bytes - low_bytes)
            low_slots = experts - high_slots
        if high_slots < 1 or low_slots < 1:
            raise CoterieError(
                f"--expert-memory: {layer_bytes:,} bytes a layer, {share:.0%} of them for experts of "
                f"{high_bytes:,} bytes and the others for experts of {low_bytes:,}: less than one of each"
            )
        return PrecisionSplit(high_slots, low_slots)
