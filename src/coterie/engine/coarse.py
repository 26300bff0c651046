"""Two precisions asked for: where coarse experts are, who is fine, and how both share memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

from coterie.naming import CoterieError
from coterie.spelling import Count, Share, Within, check_options, parse, spelled

Divided = Annotated[float, Within(least=0.01, most=0.99)]  # something of it, but not all


class Placement(Protocol):
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
class Upgrades:
    """The most voted lately: after each forward of a layer at most so many become fine."""

    most: Count = 2
    share: Divided = 0.5

    __post_init__ = check_options

    @property
    def mass(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Ballot:
    """Those who hold this share of a forward's votes are fine in it: nobody loses more than the
    others' votes, and a forward waits for whole experts too."""

    mass: Share = 0.7
    share: Divided = 0.5

    __post_init__ = check_options

    @property
    def most(self) -> int:
        return 0


@dataclass(frozen=True)
class Votes:
    """The most voted of earlier runs stay fine, all others coarse."""

    share: Divided = 0.5

    __post_init__ = check_options

    @property
    def most(self) -> int:
        return 0

    @property
    def mass(self) -> float:
        return 0.0


PLACEMENTS: dict[str, type[Placement]] = {
    "upgrades": Upgrades,
    "ballot": Ballot,
    "votes": Votes,
}


@dataclass(frozen=True)
class Coarse:
    """A second folder of the same model, its experts in fewer bits, and who is not served so."""

    folder: str | Path
    placement: Placement = field(default_factory=Upgrades)

    @staticmethod
    def parse(folder: str, placement: str | None = None) -> Coarse:
        """ "votes:share=0.3"; upgrades where nothing is said."""
        if placement is None:
            return Coarse(folder)
        return Coarse(folder, parse(placement, PLACEMENTS, "placement"))

    def document(self) -> dict[str, object]:
        """As plain values, by the names of the options."""
        return {"coarse": str(self.folder), "placement": spelled(self.placement, PLACEMENTS)}


@dataclass(frozen=True)
class Split:
    """Of each layer, places for finer experts and slots for coarse ones."""

    fine: int
    coarse: int

    @staticmethod
    def of(room: int, share: float, *, experts: int, fine: int, coarse: int) -> Split:
        """Of ``room`` bytes for a layer, where an expert weighs ``fine`` or ``coarse``.

        Where all experts are there in one precision or the other, what is left over makes more of
        them fine. Raises CoterieError where one of the two has no place.
        """
        if room >= experts * fine:
            raise CoterieError("--coarse has no effect: all experts fit into memory as they are")
        many = int(share * room) // fine
        few = (room - many * fine) // coarse
        if many + few > experts:
            many = (room - experts * coarse) // (fine - coarse)
            few = experts - many
        if many < 1 or few < 1:
            raise CoterieError(
                f"--expert-memory: {room:,} bytes a layer, {share:.0%} of them for experts of "
                f"{fine:,} bytes and the others for experts of {coarse:,}: less than one of each"
            )
        return Split(many, few)
