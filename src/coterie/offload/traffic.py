"""How many experts and bytes were moved into fast memory, and how many a cache saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coterie.offload.capacity import format_bytes


@dataclass(frozen=True)
class Transfer:
    """Experts fetched from one tier: the tier that had them, not those they passed through."""

    experts: int = 0
    bytes: int = 0

    def plus(self, other: Transfer, sign: int = 1) -> Transfer:
        return Transfer(self.experts + sign * other.experts, self.bytes + sign * other.bytes)


@dataclass(frozen=True)
class Traffic:
    """Experts used and moved in all layers by the forwards of a run.

    All counts include forwards that only write keys and values, except ``forwards``, which counts
    denoising ones. ``vanilla_misses`` is how many experts vanilla routing would have moved with LRU
    in the same slots, on the same forwards; None if it was not tracked. A vanilla run of its own
    may make fewer or more forwards.
    """

    forwards: int
    expert_bytes: int  # of one expert
    experts_used: int
    hits: int  # used experts that were cached
    transfers: Mapping[str, Transfer] = field(default_factory=dict)  # by tier
    vanilla_misses: int | None = None
    stall_seconds: float = 0.0  # seconds in which compute waited for fetches
    seconds: float = 0.0  # of the forwards, where they were timed
    on_cpu: int = 0  # used experts computed in host memory: neither hits nor moved

    @property
    def experts_moved(self) -> int:
        """Experts fetched from all tiers."""
        return sum(transfer.experts for transfer in self.transfers.values())

    @property
    def hit_rate(self) -> float:
        """Share of the used experts that were cached."""
        return self.hits / self.experts_used if self.experts_used else 1.0

    @property
    def bytes_moved(self) -> int:
        return sum(transfer.bytes for transfer in self.transfers.values())

    @property
    def bytes_without_cache(self) -> int:
        """Bytes if every used expert were fetched."""
        return self.experts_used * self.expert_bytes

    @property
    def vanilla_bytes(self) -> int | None:
        return None if self.vanilla_misses is None else self.vanilla_misses * self.expert_bytes

    @property
    def bytes_saved(self) -> int:
        """Bytes that the cache saved; without a cache every used expert is fetched."""
        return self.bytes_without_cache - self.bytes_moved

    @property
    def bytes_saved_vs_vanilla(self) -> int | None:
        """Bytes that vanilla would have moved beyond these; negative if it moved fewer."""
        vanilla_bytes = self.vanilla_bytes
        return None if vanilla_bytes is None else vanilla_bytes - self.bytes_moved

    @property
    def fraction_saved(self) -> float | None:
        """The share of vanilla's bytes that was not moved."""
        vanilla_bytes = self.vanilla_bytes
        return 1 - self.bytes_moved / vanilla_bytes if vanilla_bytes else None

    @property
    def stall_fraction(self) -> float | None:
        """Share of the forwards' time spent waiting for fetches; None if they were not timed."""
        return self.stall_seconds / self.seconds if self.seconds else None

    def to_dict(self) -> dict[str, object]:
        """The traffic as JSON. Vanilla is the unmodified model on the same forwards, with LRU and
        the same slots."""
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

    def describe(self) -> str:
        """The hit rate, the bytes from each tier, and the time without computation."""
        sizes = {tier: format_bytes(moved.bytes) for tier, moved in self.transfers.items()}
        moved = " and ".join(f"{size} from {tier}" for tier, size in sizes.items())
        stall = f", {self.stall_seconds:.2f} s waited" if self.stall_seconds else ""
        return f"{self.hit_rate:.1%} cache hits, {moved or 'nothing moved'}{stall}"

    def describe_savings(self) -> str:
        """Bytes moved, without a cache, and by the unmodified model."""
        moved, without_cache = map(format_bytes, (self.bytes_moved, self.bytes_without_cache))
        summary = f"{moved} moved, without a cache {without_cache}"
        if self.vanilla_bytes is None or self.fraction_saved is None:
            return summary
        vanilla = format_bytes(self.vanilla_bytes)
        return f"{summary}; vanilla with LRU {vanilla} ({self.fraction_saved:.0%} saved)"

    def __add__(self, other: Traffic) -> Traffic:
        """The sum, for experts of one size."""
        return self._combined(other, 1)

    def __sub__(self, earlier: Traffic) -> Traffic:
        """The traffic since an earlier reading of the same log."""
        return self._combined(earlier, -1)

    def _combined(self, other: Traffic, sign: int) -> Traffic:
        transfers = {
            tier: self.transfers.get(tier, Transfer()).plus(
                other.transfers.get(tier, Transfer()), sign
            )
            for tier in dict.fromkeys([*self.transfers, *other.transfers])
        }
        vanilla_misses = None
        if self.vanilla_misses is not None and other.vanilla_misses is not None:
            vanilla_misses = self.vanilla_misses + sign * other.vanilla_misses
        return Traffic(
            self.forwards + sign * other.forwards,
            self.expert_bytes,
            self.experts_used + sign * other.experts_used,
            self.hits + sign * other.hits,
            {tier: one for tier, one in transfers.items() if one != Transfer()},
            vanilla_misses,
            self.stall_seconds + sign * other.stall_seconds,
            self.seconds + sign * other.seconds,
            self.on_cpu + sign * other.on_cpu,
        )
