"""The rule of a store with two precisions, for one layer, with a set and a list."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.offload.mixed_precision_store import MixedPrecisionStore

DECAY = 0.8


@dataclass
class PrecisionReference:
    """Which experts of a layer have high precision, forward by forward."""

    capacity: int
    max_promotions: int
    vote_mass: float
    high: set[int]
    scores: list[float]

    def before_forward(self, used: list[bool], votes: list[float]) -> None:
        self.scores = [DECAY * score + vote for score, vote in zip(self.scores, votes, strict=True)]
        experts = sorted(
            (e for e, is_used in enumerate(used) if is_used), key=lambda e: (-votes[e], e)
        )
        total, mass, leaders = sum(votes[e] for e in experts), 0.0, []
        for expert in experts:
            share = votes[expert] / total if total else 1 / len(experts)
            if mass < self.vote_mass - 1e-12 and expert not in self.high:
                leaders.append(expert)
            mass += share
        self._promote(leaders)

    def after_forward(self, used: list[bool]) -> None:
        low = [e for e, is_used in enumerate(used) if is_used and e not in self.high]
        self._promote(sorted(low, key=lambda e: (-self.scores[e], e))[: self.max_promotions])

    def _promote(self, candidates: list[int]) -> None:
        for expert in sorted(candidates, key=lambda e: (-self.scores[e], e)):
            if len(self.high) >= self.capacity:
                victim = min(self.high, key=lambda e: (self.scores[e], -e))
                if self.scores[victim] >= self.scores[expert]:
                    return
                self.high.remove(victim)
            self.high.add(expert)


def experts_moved(store: MixedPrecisionStore) -> dict[str, int]:
    """Experts, by tier and precision."""
    return {name: one.experts for name, one in store.traffic_log.traffic().transfers.items()}
