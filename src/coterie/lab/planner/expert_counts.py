"""The experts that a block's forwards use and load: from a trace, or from an assumption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from coterie.errors import ConfigError
from coterie.lab.bench.routings import BLOCK_LENGTH
from coterie.lab.planner.synthetic_trace import RoutingLaw, SyntheticShape, synthetic_trace
from coterie.lab.replay.cache_simulation import (
    CacheConfig,
    CountArray,
    ReplayPolicy,
    SelectedExperts,
    TraceVotes,
    replay_cache,
    select_experts,
)
from coterie.lab.replay.trace import Trace
from coterie.offload.eviction import Lru
from coterie.routing import TopK
from coterie.values import Policy, RouterSpec

PUBLISHED_LAW = RoutingLaw(3.590888809412718e-06, 0.47066138713853434, 0.9822158813476562)
"""84 of 256 experts a block and their overlap from step to step (`replay-drawn-mini`)."""

SAMPLE_LAYERS, SAMPLE_BLOCKS, SEARCH_BLOCKS = 2, 6, 48
SEARCH_STEPS = 12
EVEN_MARGIN = 0.995  # share of the experts of even routing from which a search would find nothing


@dataclass(frozen=True)
class PassCounts:
    """Experts used and loaded by forwards of one kind, [P, L], and token-expert pairs of each."""

    used: CountArray
    loads: CountArray
    pairs: float

    @property
    def mean_used(self) -> float:
        return float(self.used.mean())

    @property
    def mean_loads(self) -> float:
        return float(self.loads.mean())


@dataclass(frozen=True)
class BlockCounts:
    """The forwards that decode a block, and those that commit it."""

    decode: PassCounts
    commit: PassCounts


CountExperts = Callable[[ReplayPolicy, int], BlockCounts]
"""From a policy and the slots of each layer; as many slots as experts load nothing."""


@dataclass(frozen=True)
class RoutingSample:
    """A trace to count experts in, and what it assumes, in one sentence."""

    trace: Trace
    assumption: str

    def counter(self) -> CountExperts:
        """A function that counts each case once."""
        votes = TraceVotes.of(self.trace)

        @cache
        def select(policy: ReplayPolicy, slots: int | None) -> SelectedExperts:
            return select_experts(votes, policy, slots)

        @cache
        def count(policy: ReplayPolicy, slots: int) -> BlockCounts:
            limit = slots if policy.depends_on_slots else None
            selected = None if policy.depends_on_residents else select(policy, limit)
            replayed = replay_cache(votes, policy, selected, CacheConfig(Lru(), slots))
            loads_any = slots < votes.trace.header.experts
            return _counts(votes, policy.policy, replayed.used, replayed.loads * loads_any)

        return count


def assumed_sample(
    router: RouterSpec, unique_experts: float, *, tokens: int, steps: int, source: str
) -> RoutingSample:
    """Random routing in which 32 tokens use ``unique_experts`` in a layer; ``tokens`` are drawn.

    Raises ConfigError for a number that no block can use.
    """
    if not router.k <= unique_experts <= router.experts:
        raise ConfigError(
            f"`unique_experts` is {unique_experts:g}; a block uses {router.k} to "
            f"{router.experts} of them"
        )
    shape = SyntheticShape(SAMPLE_LAYERS, router.experts, router.k, BLOCK_LENGTH, steps, True)
    law = fitted_law(shape, unique_experts)
    shape = replace(shape, tokens=tokens)
    trace = synthetic_trace(shape, law, blocks=SAMPLE_BLOCKS, seed=7)
    return RoutingSample(
        trace,
        f"a block of {tokens} tokens uses {_vanilla_count(trace):.0f} of {router.experts} experts "
        "under vanilla "
        f"({source}), alike from step to step as published for LLaDA2.0-mini",
    )


def fitted_law(shape: SyntheticShape, unique_experts: float) -> RoutingLaw:
    """The published law, with tokens that agree as much as this number of experts says."""
    probe = replace(shape, layers=1, steps=1, commits=False)

    def count(block_variance: float) -> float:
        law = replace(PUBLISHED_LAW, block_variance=block_variance)
        return _vanilla_count(synthetic_trace(probe, law, blocks=SEARCH_BLOCKS, seed=3))

    low, high = 0.0, 1.0
    if unique_experts >= EVEN_MARGIN * count(low):
        return replace(PUBLISHED_LAW, block_variance=0.0)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) > unique_experts else (low, middle)
    return replace(PUBLISHED_LAW, block_variance=(low + high) / 2)


def _vanilla_count(trace: Trace) -> float:
    masks = [f.vanilla_mask for f in trace.forwards if f.kind == "decode"]
    return float(sum(mask.sum() for mask in masks)) / (len(masks) * len(trace.header.layers))


def _counts(votes: TraceVotes, policy: Policy, used: CountArray, loads: CountArray) -> BlockCounts:
    """Counts [P, L] by kind, without the first block: nothing has loaded its experts yet."""
    trace, k = votes.trace, votes.trace.header.k
    first = [trace.forwards[rows[0]] for rows in votes.passes]
    warm = np.array([forward.block_start != first[0].block_start for forward in first])
    warm |= not (warm & votes.is_decode).any()
    decode = warm & votes.is_decode
    commit = warm & np.array([forward.kind == "commit" for forward in first])
    tokens = trace.forwards[trace.decode_indices[0]].tokens
    k_of_policy = min(policy.k, k) if isinstance(policy, TopK) else k
    decoding = PassCounts(used[decode], loads[decode], tokens * k_of_policy)
    if not commit.any():
        return BlockCounts(decoding, decoding)
    return BlockCounts(decoding, PassCounts(used[commit], loads[commit], tokens * k))
