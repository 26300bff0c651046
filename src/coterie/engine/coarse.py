"""Two precisions asked for: where the coarse experts are, and how memory is shared between both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coterie.naming import CoterieError

SHARE = 0.5
UPGRADES = 2


@dataclass(frozen=True)
class Coarse:
    """A second folder of the same model, its experts in fewer bits.

    ``share`` of the memory for experts is for finer ones, if they are not all there in either
    precision; ``upgrades`` at most come to be fine after a forward of a layer.
    """

    folder: str | Path
    share: float = SHARE
    upgrades: int = UPGRADES

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise CoterieError(f"--fine-share {self.share:g}: say a share above 0 and below 1")
        if self.upgrades < 0:
            raise CoterieError(f"--upgrades {self.upgrades}: say 0 or more")

    def document(self) -> dict[str, object]:
        """As plain values, by the names of the options."""
        return {
            "coarse": str(self.folder),
            "fine_share": self.share,
            "upgrades": self.upgrades,
        }


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
        many = min(experts, int(share * room) // fine)
        few = (room - many * fine) // coarse
        if many + few >= experts:
            many = min(experts, (room - experts * coarse) // (fine - coarse))
            few = experts - many
        if few < 1:
            raise CoterieError("--coarse has no effect: all experts fit into memory as they are")
        if many < 1:
            raise CoterieError(
                f"--fine-share {share:g}: of {room:,} bytes a layer that is less than one expert "
                f"of {fine:,}"
            )
        return Split(many, few)
