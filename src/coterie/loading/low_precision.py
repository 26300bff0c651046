"""The config of two precisions: the low-precision model, the policy, and the memory split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from coterie.errors import OffloadError
from coterie.specs import (
    Bounds,
    PositiveFraction,
    PositiveInt,
    check_options,
    format_spec,
    parse_spec,
)

OpenShare = Annotated[float, Bounds(ge=0.01, le=0.99)]  # neither nothing nor all


@dataclass(frozen=True)
class PromoteUsed:
    """After each forward of a layer, promotes at most ``most`` experts, top-voted first."""

    most: PositiveInt = 2
    share: OpenShare = 0.5

    mass = 0.0
    __post_init__ = check_options


@dataclass(frozen=True)
class VoteMassPrecision:
    """Serves this share of each forward's votes in high precision.

    This bounds the loss, but a forward waits for the high-precision experts.
    """

    mass: PositiveFraction = 0.7
    share: OpenShare = 0.5

    most = 0
    __post_init__ = check_options


@dataclass(frozen=True)
class StaticVotes:
    """The top-voted experts of earlier runs have high precision; this never changes."""

    share: OpenShare = 0.5

    most = 0
    mass = 0.0
    __post_init__ = check_options


PrecisionPolicy = PromoteUsed | VoteMassPrecision | StaticVotes
"""Which experts are served in high precision; the others are served in low precision.

``share`` is the part of the expert memory for high precision; more if low precision needs less. At
most ``most`` experts are promoted after each forward of a layer. Before it, those are promoted that
hold the share ``mass`` of its votes.
"""

PRECISION_POLICIES: dict[str, type[PrecisionPolicy]] = {
    "promote": PromoteUsed,
    "vote-mass": VoteMassPrecision,
    "static": StaticVotes,
}
SAVED_NAMES = {"promote": "upgrades", "vote-mass": "ballot", "static": "votes"}  # in run.json


@dataclass(frozen=True)
class LowPrecisionExperts:
    """A second checkpoint of the same model in fewer bits, and the policy of both precisions."""

    folder: str | Path
    precision_policy: PrecisionPolicy = field(default_factory=PromoteUsed)

    @staticmethod
    def parse(folder: str, precision_policy: str | None = None) -> LowPrecisionExperts:
        """The config of a policy text such as "static:share=0.3"; promote by default."""
        if precision_policy is None:
            return LowPrecisionExperts(folder)
        return LowPrecisionExperts(
            folder, parse_spec(precision_policy, PRECISION_POLICIES, "precision policy")
        )

    def to_dict(self) -> dict[str, object]:
        """The config as JSON, under the keys of saved runs."""
        spec = format_spec(self.precision_policy, PRECISION_POLICIES)
        name, colon, options = spec.partition(":")
        return {"coarse": str(self.folder), "placement": f"{SAVED_NAMES[name]}{colon}{options}"}


def split_slots(
    layer_bytes: int, share: float, *, experts: int, high_bytes: int, low_bytes: int
) -> tuple[int, int]:
    """The high-precision and the low-precision slots of a layer with ``layer_bytes``.

    If all experts fit in one precision or the other, spare bytes turn low-precision slots into
    high-precision ones. Raises OffloadError unless each precision has a slot.
    """
    if layer_bytes >= experts * high_bytes:
        raise OffloadError("`fallback_model` has no effect: all experts fit into memory")
    high_slots = int(share * layer_bytes) // high_bytes
    low_slots = (layer_bytes - high_slots * high_bytes) // low_bytes
    if high_slots + low_slots > experts:
        high_slots = (layer_bytes - experts * low_bytes) // (high_bytes - low_bytes)
        low_slots = experts - high_slots
    if high_slots < 1 or low_slots < 1:
        raise OffloadError(
            f"`expert_memory`: {layer_bytes:,} bytes per layer, {share:.0%} of them for experts of "
            f"{high_bytes:,} bytes and the rest for experts of {low_bytes:,}, are less than one of "
            "each"
        )
    return high_slots, low_slots
