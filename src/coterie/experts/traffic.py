"""What was moved to have experts where they are computed, and what was spared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Experts used and moved, of all layers; ``forwards`` of the run decode, and only these are
    counted so. ``vanilla`` is what the unmodified model would have moved under LRU in the same
    slots, None where nobody knows."""

    forwards: int
    expert_bytes: int  # of one expert as it is moved
    used: int
    moved: int
    vanilla: int | None = None

    @property
    def hit_rate(self) -> float:
        """Share of the experts used that were there already."""
        return 1 - self.moved / self.used if self.used else 1.0

    @property
    def bytes_moved(self) -> int:
        return self.moved * self.expert_bytes

    @property
    def bytes_avoided(self) -> int:
        """Against no cache: every expert moved whenever it is used."""
        return (self.used - self.moved) * self.expert_bytes

    @property
    def bytes_avoided_against_vanilla(self) -> int | None:
        """Negative where more was moved than vanilla would have."""
        return None if self.vanilla is None else (self.vanilla - self.moved) * self.expert_bytes

    @property
    def saved(self) -> float | None:
        """Of what vanilla would have moved, the share that was not."""
        return 1 - self.moved / self.vanilla if self.vanilla else None
