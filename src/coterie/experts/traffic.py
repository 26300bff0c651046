"""What was moved to have experts where they are computed, and what was spared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Moved:
    """What came from one tier; an expert counts where it was found, whatever it passed through."""

    experts: int = 0
    bytes: int = 0

    def joined(self, other: Moved, sign: int = 1) -> Moved:
        return Moved(self.experts + sign * other.experts, self.bytes + sign * other.bytes)


@dataclass(frozen=True)
class Traffic:
    """Experts used and moved, of all layers, by the forwards that a run made.

    All of these count, those that only write keys too; ``forwards`` are those that denoise.
    ``vanilla`` is how many experts the unmodified model would have moved under LRU in the same
    slots on the same forwards, None where nobody asked: left to itself it might have made fewer
    forwards, or more.
    """

    forwards: int
    expert_bytes: int  # of one expert, where it is moved whole
    used: int
    hits: int  # of these, those that were there already
    sources: Mapping[str, Moved] = field(default_factory=dict)  # by the tier it came from
    vanilla: int | None = None
    waited: float = 0.0  # seconds in which nothing was computed because somebody was on the way
    seconds: float = 0.0  # of the forwards, where they were timed
    aside: int = 0  # of those used, computed on a CPU where they lay: neither hits nor moved

    @staticmethod
    def counted(
        forwards: int, expert_bytes: int, *, used: int, moved: int, vanilla: int | None = None
    ) -> Traffic:
        """Of whole experts that all came from one place."""
        sources = {"elsewhere": Moved(moved, moved * expert_bytes)}
        return Traffic(forwards, expert_bytes, used, used - moved, sources, vanilla)

    @property
    def moved(self) -> int:
        """Experts that came, from wherever."""
        return sum(one.experts for one in self.sources.values())

    @property
    def hit_rate(self) -> float:
        """Share of the experts used that were there already."""
        return self.hits / self.used if self.used else 1.0

    @property
    def bytes_moved(self) -> int:
        return sum(one.bytes for one in self.sources.values())

    @property
    def bytes_without_cache(self) -> int:
        """Every expert moved whole whenever it is used."""
        return self.used * self.expert_bytes

    @property
    def bytes_of_vanilla(self) -> int | None:
        return None if self.vanilla is None else self.vanilla * self.expert_bytes

    @property
    def bytes_avoided(self) -> int:
        """Against no cache."""
        return self.bytes_without_cache - self.bytes_moved

    @property
    def bytes_avoided_against_vanilla(self) -> int | None:
        """Negative where more was moved than vanilla would have."""
        usual = self.bytes_of_vanilla
        return None if usual is None else usual - self.bytes_moved

    @property
    def saved(self) -> float | None:
        """Of the bytes that vanilla would have moved, the share that was not."""
        usual = self.bytes_of_vanilla
        return 1 - self.bytes_moved / usual if usual else None

    @property
    def stalled(self) -> float | None:
        """Share of the forwards' time in which nothing was computed; None where none was timed."""
        return self.waited / self.seconds if self.seconds else None

    def __add__(self, other: Traffic) -> Traffic:
        """Both together, of experts of one size."""
        return self._joined(other, 1)

    def __sub__(self, before: Traffic) -> Traffic:
        """What came after an earlier reading of the same ledger."""
        return self._joined(before, -1)

    def _joined(self, other: Traffic, sign: int) -> Traffic:
        tiers = {
            tier: self.sources.get(tier, Moved()).joined(other.sources.get(tier, Moved()), sign)
            for tier in dict.fromkeys([*self.sources, *other.sources])
        }
        tiers = {tier: moved for tier, moved in tiers.items() if moved != Moved()}
        mine, theirs = self.vanilla, other.vanilla
        return Traffic(
            forwards=self.forwards + sign * other.forwards,
            expert_bytes=self.expert_bytes,
            used=self.used + sign * other.used,
            hits=self.hits + sign * other.hits,
            sources=tiers,
            vanilla=None if mine is None or theirs is None else mine + sign * theirs,
            waited=self.waited + sign * other.waited,
            seconds=self.seconds + sign * other.seconds,
            aside=self.aside + sign * other.aside,
        )
