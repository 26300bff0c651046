"""Where experts live changes no answer: not the tiers, not who leaves, not what goes wrong."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.engine.events import Finished
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CoterieError
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.eviction import ByVotes, Eviction, Lfu, Lru
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.host_cache import HostCache
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.offload.tiers import DiskTier, ExpertFileSpan, HostTier, Tier
from coterie.testing import random_transformer, read_spec, tiny_config
from coterie.tokenizer import IdTokenizer
from coterie.values import ExpertStore, Slab

VOCABULARY, MASK = 96, 95
Sizes = tuple[str, int]  # family, experts
FIXED = ("vanilla", "des-vote:beta=0.4", "des-seq:k=2", "topk:k=1", "des-vote:beta=0.1")
RESIDENT = (
    "resident-vote:beta=0.3,resident_bonus=4,max_vote_loss=0.4",
    "proportional-vote:beta=0.3,resident_bonus=3,max_vote_loss=0.3",
)


@cache
def tiny(sizes: Sizes) -> Model:
    """All of its experts in memory."""
    family, experts = sizes
    kind, spec = read_spec(tiny_config(family, num_experts=experts))
    weights = random_transformer(spec, seed=experts)
    return Model(f"tiny {family}", kind, weights, IdTokenizer(VOCABULARY), MASK, (94,))


def over(model: Model, store: ExpertStore) -> Model:
    """The same with other shelves."""
    layers = tuple(
        replace(layer, feed_forward=replace(layer.feed_forward, store=store))
        if isinstance(layer.feed_forward, MoE)
        else layer
        for layer in model.transformer.layers
    )
    return replace(model, transformer=replace(model.transformer, layers=layers))


def resident(model: Model) -> ResidentExpertStore:
    networks = (layer.feed_forward for layer in model.transformer.layers)
    store = next(network.store for network in networks if isinstance(network, MoE))
    assert isinstance(store, ResidentExpertStore)
    return store


@cache
def blobs(sizes: Sizes) -> dict[int, Tensor]:
    """Of each layer [E, bytes]: gate and up, then down, in fp32."""
    return {
        layer: torch.cat([weight.flatten(1) for weight in (slab.gate_up, slab.down)], 1)
        .contiguous()
        .view(torch.uint8)
        for layer, slab in resident(tiny(sizes)).slabs.items()
        if isinstance(slab.gate_up, Tensor) and isinstance(slab.down, Tensor)
    }


@cache
def files(sizes: Sizes) -> DiskTier:
    """The same, written."""
    layers, folder = {}, Path(tempfile.mkdtemp())
    for layer, whole in blobs(sizes).items():
        (folder / str(layer)).write_bytes(b"header" + whole.numpy().tobytes())
        sums = tuple(zlib.crc32(one.numpy().tobytes()) for one in whole)
        layers[layer] = ExpertFileSpan(folder / str(layer), 6, whole.shape[1], sums)
    return DiskTier(layers)


@dataclass(frozen=True)
class Chain:
    """What experts come through: from a disk or from memory, and how many the host keeps."""

    disk: bool
    host: int | None
    capacity: int
    rule: Eviction
    warm: int | None  # whom votes of earlier runs favour
    fail: frozenset[int] = frozenset()  # reads
    stop: frozenset[int] = frozenset()  # slabs that Ctrl-C comes with

    def store(self, sizes: Sizes) -> CachedExpertStore:
        layers, experts, size = list(blobs(sizes)), sizes[1], blobs(sizes)[1].shape[1]
        tier: Tier = Faulty(files(sizes) if self.disk else HostTier(blobs(sizes)), self.fail)
        if self.host is not None:
            memory = torch.full((self.host, size), 255, dtype=torch.uint8)
            tier = HostCache(tier, memory)
        votes = [] if self.warm is None else [(one * self.warm) % 7 / 7 for one in range(experts)]
        return CachedExpertStore(
            ThreadedFetcher(tier),
            Shown(sizes, self.stop),
            lambda slots, size: torch.full((slots, size), 255, dtype=torch.uint8),  # NaN
            experts,
            size,
            self.capacity,
            self.rule,
            {layer: torch.tensor(votes).double().numpy() for layer in layers if votes},
        )


@dataclass(frozen=True)
class Faulty:
    """A tier some of whose reads fail; asked again, they work."""

    tier: Tier
    fail: frozenset[int]
    reads: Iterator[int] = field(default_factory=count)

    def fetch(self, layer: int, expert: int, into: Tensor):
        if next(self.reads) in self.fail:
            into.fill_(255)
            raise CoterieError(f"expert {expert} of layer {layer} cannot be read")
        return self.tier.fetch(layer, expert, into)


@dataclass(frozen=True)
class Shown:
    """fp32 experts as a slab; some moments that is when somebody presses Ctrl-C."""

    sizes: Sizes
    stop: frozenset[int]
    seen: Iterator[int] = field(default_factory=count)

    def __call__(self, memory: Tensor, slot_of: Tensor) -> Slab:
        if next(self.seen) in self.stop:
            raise KeyboardInterrupt
        spec = tiny(self.sizes).spec
        numbers, part = memory.view(torch.float32), 2 * spec.expert_width * spec.hidden
        return Slab(
            numbers[:, :part].reshape(-1, 2 * spec.expert_width, spec.hidden),
            numbers[:, part:].reshape(-1, spec.hidden, spec.expert_width),
            slot_of,
        )


def answers(model: Model, requests: Sequence[dict[str, object]]) -> list[tuple[int, ...]]:
    """Tokens of rows that are decoded together; whatever goes wrong is tried again."""
    engine = Engine(model, generation=GenerationConfig(max_new_tokens=10, block=4))
    with torch.inference_mode():
        numbers = [engine.submit(**request) for request in requests]  # type: ignore[arg-type]
        found: dict[int, tuple[int, ...]] = {}
        for _ in range(200):
            try:
                told = engine.step()
            except (CoterieError, KeyboardInterrupt):
                continue
            found |= {one.row: one.result.tokens for one in told if isinstance(one, Finished)}
            if not engine.rows:
                break
    return [found[number] for number in numbers]


models = st.one_of(
    st.just(("llada2", 16)),
    st.tuples(st.sampled_from(("llada-moe", "sdar-moe")), st.sampled_from((4, 7, 12))),
)
rules = st.one_of(
    st.just(Lru()), st.just(Lfu()), st.floats(0.1, 1).map(lambda decay: ByVotes(decay=decay))
)
few = st.frozensets(st.integers(0, 60), max_size=5)


def chains(*, faults: bool) -> st.SearchStrategy[Chain]:
    never = st.just(frozenset[int]())
    return st.builds(
        Chain,
        disk=st.booleans(),
        host=st.none() | st.integers(1, 12),
        capacity=st.integers(1, 18),
        rule=rules,
        warm=st.none() | st.integers(1, 6),
        fail=few if faults else never,
        stop=few if faults else never,
    )


def rows(policies: Sequence[str]) -> st.SearchStrategy[list[dict[str, object]]]:
    one = st.fixed_dictionaries(
        {
            "prompt": st.lists(st.integers(0, 93), min_size=1, max_size=8),
            "policy": st.sampled_from(policies),
            "block": st.sampled_from([4, 8]),
            "kv_cache": st.sampled_from(["block-causal", "prefix", "dual:before=2,after=3"]),
            "unmask": st.sampled_from(["fixed:steps=2", "threshold:p=0.05", "fixed:steps=3"]),
            "commit": st.sampled_from(["vanilla", "policy"]),
        }
    )
    return st.lists(one, min_size=1, max_size=3)


def hold_same_tokens(sizes: Sizes, chain: Chain, requests: list[dict[str, object]]) -> None:
    model = tiny(sizes)
    assert answers(over(model, chain.store(sizes)), requests) == answers(model, requests)


def hold_same_election(sizes: Sizes, chain: Chain, requests: list[dict[str, object]]) -> None:
    """The same votes, the same preference: whoever prefers residents sees the same ones."""
    model, store = tiny(sizes), chain.store(sizes)
    imagined = SimulatedCacheStore(
        resident(model), CacheSimulator(sizes[1], chain.capacity, chain.rule)
    )
    assert answers(over(model, store), requests) == answers(over(model, imagined), requests)
    real, simulated = store.traffic_log.traffic(), imagined.traffic_log.traffic()
    assert (real.experts_used, real.experts_moved) == (
        simulated.experts_used,
        simulated.experts_moved,
    )


@given(models, chains(faults=True), rows(FIXED))
@law(12)
def test_every_store_answers_as_if_all_were_in_memory(sizes, chain, requests) -> None:
    """Tiers, slots, rules, waves, rows side by side, failing reads and interruptions."""
    hold_same_tokens(sizes, chain, requests)


@given(models, chains(faults=False).map(lambda chain: replace(chain, warm=None)), rows(RESIDENT))
@law(8)
def test_residency_bonus_acts_as_over_a_simulated_cache(sizes, chain, requests) -> None:
    hold_same_election(sizes, chain, requests)


@pytest.mark.slow
@given(models, chains(faults=True), rows(FIXED))
@law(1500)
def test_every_store_answers_as_if_all_were_in_memory_at_length(sizes, chain, requests) -> None:
    hold_same_tokens(sizes, chain, requests)


@pytest.mark.slow
@given(models, chains(faults=False).map(lambda chain: replace(chain, warm=None)), rows(RESIDENT))
@law(500)
def test_residency_bonus_acts_the_same_at_length(sizes, chain, requests) -> None:
    hold_same_election(sizes, chain, requests)
