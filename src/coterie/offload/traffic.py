"""What was moved to have experts where they are computed, and what was spared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Transfer:
    """What came from one tier; an expert counts where it was found, whatever it passed through."""

    experts: int = 0
    bytes: int = 0

    def plus(self, other: Transfer, sign: int = 1) -> Transfer:
        return Transfer(self.experts + sign * other.experts, self.bytes + sign * other.bytes)


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
    experts_used: int
    hits: int  # of these, those that were there already
    transfers: Mapping[str, Transfer] = field(default_factory=dict)  # by the tier it came from
    vanilla_misses: int | None = None
    stall_seconds: float = (
        0.0  # seconds in which nothing was computed because somebody was on the way
    )
    seconds: float = 0.0  # of the forwards, where they were timed
    on_cpu: int = 0  # of those used, computed on a CPU where they lay: neither hits nor moved

    @staticmethod
    def from_counts(
        forwards: int,
        expert_bytes: int,
        *,
        experts_used: int,
        misses: int,
        vanilla_misses: int | None = None,
    ) -> Traffic:
        """Of whole experts that all came from one place."""
        transfers = {"elsewhere": Transfer(misses, misses * expert_bytes)}
        return Traffic(
            forwards, expert_bytes, experts_used, experts_used - misses, transfers, vanilla_misses
        )

    @property
    def experts_moved(self) -> int:
        """Experts that came, from wherever."""
        return sum(transfer.experts for transfer in self.transfers.values())

    @property
    def hit_rate(self) -> float:
        """Share of the experts used that were there already."""
        return self.hits / self.experts_used if self.experts_used else 1.0

    @property
    def bytes_moved(self) -> int:
        return sum(transfer.bytes for transfer in self.transfers.values())

    @property
    def bytes_without_cache(self) -> int:
        """Every expert moved whole whenever it is used."""
        return self.experts_used * self.expert_bytes

    @property
    def vanilla_bytes(self) -> int | None:
        return None if self.vanilla_misses is None else self.vanilla_misses * self.expert_bytes

    @property
    def bytes_saved(self) -> int:
        """Against no cache."""
        return self.bytes_without_cache - self.bytes_moved

    @property
    def bytes_saved_vs_vanilla(self) -> int | None:
        """Negative where more was moved than vanilla would have."""
        vanilla_bytes = self.vanilla_bytes
        return None if vanilla_bytes is None else vanilla_bytes - self.bytes_moved

    @property
    def fraction_saved(self) -> float | None:
        """Of the bytes that vanilla would have moved, the share that was not."""
        vanilla_bytes = self.vanilla_bytes
        return 1 - self.bytes_moved / vanilla_bytes if vanilla_bytes else None

    @property
    def stall_fraction(self) -> float | None:
        """Share of the forwards' time in which nothing was computed; None where none was timed."""
        return self.stall_seconds / self.seconds if self.seconds else None

    def to_dict(self) -> dict[str, object]:
        """As JSON. Vanilla stands for the unmodified model on the same forwards, with LRU and the
        same slots."""
        return {
            "forwards": self.forwards,
            "experts_used": self.experts_used,
            "experts_moved": self.experts_moved,
            "experts_on_cpu": self.on_cpu,
            "hit_rate": self.hit_rate,
            "bytes_moved": self.bytes_moved,
            "bytes_moved_from": {tier: moved.bytes for tier, moved in self.transfers.items()},
            "bytes_avoided": self.bytes_saved,
            "bytes_avoided_against_vanilla": self.bytes_saved_vs_vanilla,
            "saved_against_vanilla": self.fraction_saved,
            "stall_seconds": self.stall_seconds,
            "stalled": self.stall_fraction,
        }

    def __add__(self, other: Traffic) -> Traffic:
        """Both together, of experts of one size."""
        return self._combined(other, 1)

    def __sub__(self, earlier: Traffic) -> Traffic:
        """What came after an earlier reading of the same ledger."""
        return self._combined(earlier, -1)

    def _combined(self, other: Traffic, sign: int) -> Traffic:
        transfers = {
            tier: self.transfers.get(tier, Transfer()).plus(
                other.transfers.get(tier, Transfer()), sign
            )
            for tier in dict.fromkeys([*self.transfers, *other.transfers])
        }
        transfers = {
            tier: transfer for tier, transfer in transfers.items() if transfer != Transfer()
        }
        self_vanilla, other_vanilla = self.vanilla_misses, other.vanilla_misses
        return Traffic(
            forwards=self.forwards + sign * other.forwards,
            expert_bytes=self.expert_bytes,
            experts_used=self.experts_used + sign * other.experts_used,
            hits=self.hits + sign * other.hits,
            transfers=transfers,
            vanilla_misses=None
            if self_vanilla is None or other_vanilla is None
            else self_vanilla + sign * other_vanilla,
            stall_seconds=self.stall_seconds + sign * other.stall_seconds,
            seconds=self.seconds + sign * other.seconds,
            on_cpu=self.on_cpu + sign * other.on_cpu,
        )
