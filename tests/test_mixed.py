"""Experts in two precisions: each is computed in the one that its placement says."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import law
from test_offload import (
    ASKED,
    HIDDEN,
    LAYERS,
    PROMPT,
    SIZE,
    blobs,
    computed,
    needs_kernels,
    routings,
    shown,
    store,
)
from torch import Tensor

import coterie
from coterie.cli.edge import run
from coterie.engine.coarse import Ballot, Coarse, Placement, Split, Upgrades, Votes
from coterie.engine.convert import Aim, convert
from coterie.engine.engine import Engine
from coterie.engine.journal import MANIFEST
from coterie.engine.memory import Memory
from coterie.engine.warm import SavedVotes
from coterie.evals.run import about
from coterie.experts.couriers import Readers
from coterie.experts.eviction import ByVotes, Lru
from coterie.experts.mixed import Errors, Mixed, Source, shares
from coterie.experts.slots import Slots
from coterie.experts.store import Resident
from coterie.experts.tiers import InMemory, Tier
from coterie.experts.upgrades import Finer
from coterie.model.moe import MoE
from coterie.naming import CoterieError
from coterie.planning.precisions import Mixture
from coterie.testing import write_checkpoint
from coterie.values import Demand, Routing, Slab

DECAY = 0.8


@dataclass
class Whimsical:
    """A tier that takes as long as it likes, and fails where it is told to."""

    tier: Tier
    draw: random.Random
    broken: set[int] = field(default_factory=set)

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        time.sleep(self.draw.random() * 1e-3)
        if expert in self.broken:
            raise CoterieError(f"expert {expert} of layer {layer} is broken")
        return self.tier.fetch(layer, expert, into)


@dataclass(frozen=True)
class Room:
    """Places in either precision, and upgrades a forward."""

    fine: int
    coarse: int
    upgrades: int
    mass: float = 0.0


ROOMS = st.builds(
    Room,
    st.integers(1, 11),
    st.integers(1, 11),
    st.integers(0, 4),
    st.sampled_from((0.0, 0.3, 0.6, 1.0)),
)


def mixed(fine: Tier, coarse: Tier, experts: int, room: Room, **more: object) -> Mixed:
    def allocate(slots: int, size: int) -> Tensor:
        return torch.full((slots, size), 255, dtype=torch.uint8)  # NaN

    source = Source(Readers(fine), shown, allocate, SIZE, room.fine)
    return Mixed(source, store(coarse, experts, room.coarse), room.upgrades, room.mass, **more)


@dataclass
class Plainly:
    """The same rule for one layer, told with a set and a list: who is fine, and who comes next."""

    capacity: int
    upgrades: int
    mass: float
    fine: set[int]
    worth: list[float]

    def asked(self, used: list[bool], votes: list[float]) -> None:
        """Before the forward is computed."""
        self.worth = [DECAY * own + vote for own, vote in zip(self.worth, votes, strict=True)]
        those = sorted((e for e, asked in enumerate(used) if asked), key=lambda e: (-votes[e], e))
        whole, held, leaders = sum(votes[e] for e in those), 0.0, []
        for expert in those:
            part = votes[expert] / whole if whole else 1 / len(those)
            if held < self.mass - 1e-12 and expert not in self.fine:
                leaders.append(expert)
            held += part
        self._come(leaders)

    def served(self, used: list[bool]) -> None:
        """After that."""
        missed = [e for e, asked in enumerate(used) if asked and e not in self.fine]
        self._come(sorted(missed, key=lambda e: (-self.worth[e], e))[: self.upgrades])

    def _come(self, wishing: list[int]) -> None:
        for expert in sorted(wishing, key=lambda e: (-self.worth[e], e)):
            if len(self.fine) >= self.capacity:
                least = min(self.fine, key=lambda e: (self.worth[e], -e))
                if self.worth[least] >= self.worth[expert]:
                    return
                self.fine.remove(least)
            self.fine.add(expert)


def blended(fine: Slab, coarse: Slab, who: set[int]) -> Resident:
    """All experts in memory, these in the finer precision."""
    chosen = torch.tensor([expert in who for expert in range(len(fine.slot_of))])[:, None, None]
    gate_up, down = (
        torch.where(chosen, getattr(fine, part), getattr(coarse, part))
        for part in ("gate_up", "down")
    )
    return Resident({layer: Slab(gate_up, down, fine.slot_of) for layer in LAYERS})


@given(st.integers(1, 10), ROOMS, st.booleans(), st.integers(0, 2**20))
@law(40)
def test_each_expert_is_computed_in_the_precision_of_its_placement(
    experts: int, room: Room, warmed: bool, seed: int
) -> None:
    """Whatever the sizes, the places, the upgrades a forward, and when they come."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    best, rough = blobs(experts, seed), blobs(experts, seed + 1)
    warm = {layer: numbers.integers(0, 4, experts) / 1.0 for layer in LAYERS if warmed}
    own = mixed(
        Whimsical(InMemory(best), draw),
        Whimsical(InMemory(rough), draw),
        experts, room, warm=warm, rule=ByVotes(DECAY),
    )  # fmt: skip
    everyone, plain = torch.arange(experts), {}
    for layer in LAYERS:
        votes = [float(vote) for vote in warm.get(layer, np.zeros(experts))]
        order = sorted(range(experts), key=lambda e: (-votes[e], e))
        first = {e for e in order[: room.fine] if votes[e]}
        plain[layer] = Plainly(room.fine, room.upgrades, room.mass, first, votes)
    for place, routing in enumerate(routings(experts, seed, count=8)):
        layer = LAYERS[draw.randrange(2)]
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(place))
        used = routing.used.tolist()
        plain[layer].asked(used, [float(asked) for asked in used])
        true = blended(
            shown(best[layer], everyone), shown(rough[layer], everyone), plain[layer].fine
        )
        torch.testing.assert_close(
            computed(own, layer, routing, x), computed(true, layer, routing, x),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip
        plain[layer].served(used)


@given(st.integers(1, 10), ROOMS, st.integers(0, 2**20))
@law(30)
def test_a_replay_of_two_precisions_tells_what_the_store_moves(
    experts: int, room: Room, seed: int
) -> None:
    own = mixed(InMemory(blobs(experts)), InMemory(blobs(experts)), experts, room)
    fine, coarse = Finer(experts, room.fine, ByVotes()), Slots(experts, room.coarse, Lru())
    book = Mixture(fine, coarse, room.upgrades, room.mass)
    for routing in routings(experts, seed, count=8):
        list(own.serve(1, Demand(routing.used)))
        book.serve(routing.used.numpy(), routing.used.double().numpy())
    own._arrived(1)
    traffic = own.ledger.traffic()
    came = {"host, fine": book.came["at once"] + book.came["later"]}
    came |= {"host, coarse": book.came["coarse"]}
    assert moved(own) == {name: count for name, count in came.items() if count}
    assert (traffic.used, traffic.hits) == (book.used, book.hits)
    assert own.precision.fine == pytest.approx(book.votes_fine)


def only(experts: int, *wanted: int) -> Demand:
    used = torch.zeros(experts, dtype=torch.bool)
    used[list(wanted)] = True
    return Demand(used)


def moved(store: Mixed) -> dict[str, int]:
    """Experts, by tier and precision."""
    return {name: one.experts for name, one in store.ledger.traffic().sources.items()}


def test_who_is_worth_more_is_never_evicted() -> None:
    own = mixed(InMemory(blobs(6)), InMemory(blobs(6)), 6, Room(2, 6, 2), rule=ByVotes(DECAY))
    for wanted in ((0, 1), (0, 1), (0, 1, 2), (3,), (4, 5)):
        list(own.serve(1, only(6, *wanted)))
        assert own._shelf(1).book.resident.tolist() == [True, True, *[False] * 4]
    assert own.precision.upgrades == moved(own)["host, fine"] == 2
    for _ in range(4):
        list(own.serve(1, only(6, 5)))
    assert own._shelf(1).book.resident.tolist() == [True, *[False] * 4, True]


def test_without_upgrades_the_placement_stays() -> None:
    votes = np.array([0.0, 3.0, 1.0, 2.0, 0.0])
    own = mixed(InMemory(blobs(5)), InMemory(blobs(5)), 5, Room(2, 5, 0), warm={1: votes})
    for routing in routings(5, 3, count=6):
        list(own.serve(1, Demand(routing.used)))
        assert own._shelf(1).book.resident.tolist() == [False, True, False, True, False]
    assert moved(own) == {"host, fine": 2, "host, coarse": 3}


def test_the_loss_bound_is_vote_share_times_error() -> None:
    errors = {1: Errors(np.full(4, 0.01), np.array([0.1, 0.2, 0.3, 0.4]))}
    own = mixed(
        InMemory(blobs(4)), InMemory(blobs(4)), 4, Room(1, 4, 0),
        warm={1: np.array([0.0, 0.0, 0.0, 1.0])}, errors=errors,
    )  # fmt: skip
    list(own.serve(1, only(4, 1, 3)))
    assert own.precision.forwards == 1
    assert own.precision.fine == pytest.approx(0.5)
    assert own.precision.loss_bound == pytest.approx(0.5 * 0.2 + 0.5 * 0.01)
    assert own.precision.loss_rms == pytest.approx((0.5 * 0.2**2 + 0.5 * 0.01**2) ** 0.5)


def test_who_holds_most_votes_is_fine_at_once_and_the_loss_is_bounded() -> None:
    """Where they have places."""
    experts, mass = 12, 0.6
    errors = {1: Errors(np.full(experts, 0.01), np.full(experts, 0.1))}
    room = Room(experts, experts, 0, mass)
    own = mixed(InMemory(blobs(12)), InMemory(blobs(12, 1)), experts, room, errors=errors)
    for place, routing in enumerate(routings(experts, 5, count=6)):
        list(own.serve(1, Demand(routing.used)))
        assert own.precision.fine >= (place + 1) * mass - 1e-9
    assert own.precision.loss_bound <= mass * 0.01 + (1 - mass) * 0.1
    assert own.precision.fine < 6


def test_votes_of_the_unused_are_nobodys_share() -> None:
    votes, used = np.array([3.0, 1.0, 4.0, 0.0]), np.array([True, True, False, True])
    assert shares(votes, used).tolist() == [0.75, 0.25, 0.0, 0.0]
    assert shares(np.zeros(4), used).tolist() == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3])


def test_an_upgrade_that_fails_is_an_error_of_the_next_forward_and_nothing_stays() -> None:
    best, rough = blobs(6), blobs(6, 1)
    flaky = Whimsical(InMemory(best), random.Random(0), {2})
    own = mixed(flaky, InMemory(rough), 6, Room(3, 6, 3), rule=Lru())
    list(own.serve(1, only(6, 1, 2)))
    with pytest.raises(CoterieError, match="expert 2 of layer 1 is broken"):
        list(own.serve(1, only(6, 1, 2)))
    flaky.broken.clear()
    x = torch.randn(5, HIDDEN)
    routing = Routing(
        torch.tensor([[1, 2]] * 5), torch.ones(5, 2), only(6, 1, 2).used, torch.tensor([[1, 2]] * 5)
    )
    everyone = torch.arange(6)
    for who in (set(), {1, 2}):
        true = blended(shown(best[1], everyone), shown(rough[1], everyone), who)
        torch.testing.assert_close(
            computed(own, 1, routing, x), computed(true, 1, routing, x), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("part", ["fine", "coarse"])
def test_what_fails_or_is_left_in_the_middle_leaves_no_wrong_weights(part: str) -> None:
    """Every third forward fails or is broken off; the others are as their placement says."""
    best, rough = blobs(9), blobs(9, 1)
    flaky = {
        name: Whimsical(InMemory(held), random.Random(0))
        for name, held in (("fine", best), ("coarse", rough))
    }
    own = mixed(flaky["fine"], flaky["coarse"], 9, Room(3, 4, 2), rule=ByVotes(DECAY))
    everyone, failed = torch.arange(9), 0
    for place, routing in enumerate(routings(9, 2, count=15, tokens=2)):
        if place % 3 == 1:
            flaky[part].broken.update(range(9))
            try:
                list(own.serve(1, Demand(routing.used)))
                own._arrived(1)  # the upgrades that began
            except CoterieError:
                failed += 1
            flaky[part].broken.clear()
        elif place % 3 == 2:
            next(own.serve(1, Demand(routing.used)))
        else:
            who = set(np.flatnonzero(own._shelf(1).book.resident).tolist())
            x = torch.randn(2, HIDDEN)
            true = blended(shown(best[1], everyone), shown(rough[1], everyone), who)
            torch.testing.assert_close(
                computed(own, 1, routing, x), computed(true, 1, routing, x), atol=1e-5, rtol=1e-5
            )
    assert failed > 2


def test_who_cannot_even_be_begun_is_not_taken_to_be_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The book has given out places by then."""
    best, rough, begun, left = blobs(6), blobs(6, 1), Readers.bring, [None, None]

    def bring(self: Readers, layer: int, expert: int, into: Tensor):
        if self is own.fine.courier and left and left.pop() is None and not left:
            raise RuntimeError("can't start new thread")
        return begun(self, layer, expert, into)

    own = mixed(InMemory(best), InMemory(rough), 6, Room(3, 6, 3), rule=Lru())
    monkeypatch.setattr(Readers, "bring", bring)
    with pytest.raises(RuntimeError, match="new thread"):
        list(own.serve(1, only(6, 0, 1, 2)))
    ids = torch.tensor([[0, 1, 2]] * 5)
    routing = Routing(ids, torch.ones(5, 3), only(6, 0, 1, 2).used, ids)
    x, everyone = torch.randn(5, HIDDEN), torch.arange(6)
    true = blended(shown(best[1], everyone), shown(rough[1], everyone), set())
    torch.testing.assert_close(
        computed(own, 1, routing, x), computed(true, 1, routing, x), atol=1e-5, rtol=1e-5
    )


def test_who_was_to_be_fine_from_the_start_is_said_and_not_asked_for_again() -> None:
    flaky = Whimsical(InMemory(blobs(6)), random.Random(0), {1})
    own = mixed(
        flaky,
        InMemory(blobs(6, 1)),
        6,
        Room(2, 3, 0),
        warm={1: np.array([0.0, 3.0, 1.0, 2.0, 0.0, 0.0])},
    )
    with pytest.raises(CoterieError, match="expert 1 of layer 1 is broken"):
        own.fill([1])
    for _ in range(2):
        list(own.serve(1, only(6, 0, 1)))
    flaky.broken.clear()
    own.empty()
    assert np.flatnonzero(own._shelf(1).book.resident).tolist() == [1, 3]


def test_what_fills_the_memory_is_in_no_forward_and_nothing_that_came_is_lost() -> None:
    votes = np.array([0.0, 3.0, 1.0, 2.0, 0.0, 0.0])
    own = mixed(InMemory(blobs(6)), InMemory(blobs(6, 1)), 6, Room(2, 3, 1), warm={1: votes})
    own.fill([1])
    assert moved(own) == {"host, fine": 2}
    own.ledger.began("decode")
    list(own.serve(1, only(6, 1, 3)))
    own.ledger.ended()
    list(own.serve(1, only(6, 0)))  # comes coarse, and begins to come fine
    own.empty()
    upgraded = own.precision.upgrades
    assert moved(own) == {"host, fine": 2 + upgraded + 2, "host, coarse": 1}
    first, *_ = own.ledger.lines
    assert first.traffic.moved == 0


def test_emptied_it_is_as_at_the_start() -> None:
    votes = np.array([0.0, 3.0, 1.0, 2.0, 0.0, 0.0])
    best, rough = InMemory(blobs(6)), InMemory(blobs(6, 1))
    own, new = (mixed(best, rough, 6, Room(2, 3, 2), warm={1: votes}) for _ in range(2))
    before = [Demand(r.used) for r in routings(6, 5, count=5)]
    for demand in before:
        list(own.serve(1, demand))
    own.empty()
    x = torch.randn(5, HIDDEN)
    for routing in routings(6, 7, count=5):
        assert torch.equal(computed(own, 1, routing, x), computed(new, 1, routing, x))
    assert own.ledger.traffic().used == new.ledger.traffic().used + sum(
        int(demand.used.sum()) for demand in before
    )


def test_who_is_here_in_either_precision_is_resident() -> None:
    own = mixed(InMemory(blobs(6)), InMemory(blobs(6)), 6, Room(1, 2, 1))
    for _ in range(2):
        list(own.serve(1, only(6, 4)))
    list(own.serve(1, only(6, 2, 5)))
    here = own.resident(1)
    assert here is not None
    assert here.tolist() == [False, False, True, False, True, True]
    assert own.slots(1) == 3


@dataclass
class Plain:
    """All experts of two folders in memory; of each layer a plain rule says which one serves."""

    fine: Resident
    coarse: Resident
    rules: dict[int, Plainly]

    def serve(self, layer: int, demand: Demand) -> Iterator[Slab]:
        rule, everyone = self.rules[layer], range(len(demand.used))
        used, votes = demand.used.tolist(), demand.votes
        assert votes is not None
        rule.asked(used, votes.tolist())
        who = torch.tensor([expert in rule.fine for expert in everyone])
        for held, mask in ((self.fine, who), (self.coarse, ~who)):
            slab = held.slabs[layer]
            yield replace(slab, slot_of=slab.slot_of.where(mask, -1))
        rule.served(used)

    def resident(self, layer: int) -> Tensor | None:
        del layer
        return None

    def slots(self, layer: int) -> int | None:
        del layer
        return None


def folders(folder: Path, kinds: tuple[str, str], family: str = "llada2") -> tuple[Path, Path]:
    """One tiny model of 16 experts a layer, packed twice."""
    whole = write_checkpoint(folder / "whole", family, dtype=torch.bfloat16)
    for kind in kinds:
        convert(whole, folder / kind, Aim.of(kind))
    return folder / kinds[0], folder / kinds[1]


def opened(folder: Path, memory: Memory | None = None) -> Engine:
    return coterie.load(folder, dtype="float32", device="cpu", expert_memory=memory)


def plainly(fine: Path, coarse: Path, own: Mixed) -> tuple[Engine, Plain]:
    """An engine that answers by the plain rule, begun where ``own`` begins."""
    model, rough = opened(fine).model, opened(coarse).model
    networks = [one.feed_forward for one in model.transformer.layers]
    held = next(one.store for one in networks if isinstance(one, MoE))
    others = next(
        one.feed_forward.store
        for one in rough.transformer.layers
        if isinstance(one.feed_forward, MoE)
    )
    assert isinstance(held, Resident)
    assert isinstance(others, Resident)
    rules = {}
    for layer in model.spec.moe_layers:
        votes = [float(vote) for vote in own.warm.get(layer, np.zeros(16))]
        order = sorted(range(16), key=lambda e: (-votes[e], e))[: own.fine.capacity]
        fine_first = {e for e in order if votes[e]}
        rules[layer] = Plainly(own.fine.capacity, own.upgrades, own.mass, fine_first, votes)
    store = Plain(held, others, rules)
    layers = tuple(
        replace(one, feed_forward=replace(one.feed_forward, store=store))
        if isinstance(one.feed_forward, MoE)
        else one
        for one in model.transformer.layers
    )
    transformer = replace(model.transformer, layers=layers)
    return Engine(replace(model, transformer=transformer)), store


def drawn_votes(layers: Sequence[int]) -> SavedVotes:
    draw = np.random.default_rng(1)
    return SavedVotes.of("drawn", layers, draw.integers(0, 9, (len(layers), 16)) / 1.0)


@needs_kernels
@pytest.mark.parametrize(
    ("family", "kinds", "memory", "placement"),
    [
        ("llada2", ("int8", "int4"), "35%", Upgrades(1)),
        ("llada2", ("bf16", "int4"), "20%", Upgrades(3)),
        ("llada-moe", ("int8", "int4"), "70%", Upgrades()),
        ("llada-moe", ("int8", "int4"), "40%", Ballot()),
        ("llada2", ("bf16", "int4"), "25%", Ballot(0.4)),
        ("sdar-moe", ("bf16", "int4"), "35%", Votes()),
        ("llada2", ("int8", "int4"), "75%", Votes()),
    ],
)
def test_a_model_answers_as_if_each_expert_had_the_precision_of_its_placement(
    tmp_path: Path, family: str, kinds: tuple[str, str], memory: str, placement: Placement
) -> None:
    fine, coarse = folders(tmp_path, kinds, family)
    layers = opened(fine).model.spec.moe_layers
    warm = drawn_votes(layers) if isinstance(placement, Votes) else None
    asked = Memory.parse(memory, warm=warm, coarse=Coarse(coarse, placement))
    own = opened(fine, asked)
    store = mixed_of(own)
    reference, plain = plainly(fine, coarse, store)
    for policy in ("vanilla", "des-vote:beta=0.3"):
        found, true = (one.generate(PROMPT, policy=policy, **ASKED) for one in (own, reference))
        assert found.tokens == true.tokens
    for layer in layers:
        here = set(np.flatnonzero(store._shelf(layer).book.resident).tolist())
        assert here == plain.rules[layer].fine
    assert (store.precision.upgrades > 0) == (not isinstance(placement, Votes))
    assert 0 < store.precision.fine < store.precision.forwards
    assert store.precision.bound > 0


def mixed_of(engine: Engine) -> Mixed:
    network = next(
        one.feed_forward
        for one in engine.model.transformer.layers
        if isinstance(one.feed_forward, MoE)
    )
    assert isinstance(network.store, Mixed)
    return network.store


@needs_kernels
def test_a_whole_model_in_two_precisions_reads_each_expert_once(tmp_path: Path) -> None:
    fine, coarse = folders(tmp_path, ("int8", "int4"))
    warm = drawn_votes(opened(fine).model.spec.moe_layers)
    engine = opened(fine, Memory.parse("75%", warm=warm, coarse=Coarse(coarse, Votes())))
    store = mixed_of(engine)
    assert store.fine.capacity + store.coarse.capacity == 16
    engine.generate(PROMPT, **ASKED)
    traffic = store.ledger.traffic()
    places = (store.fine.capacity, store.coarse.capacity)
    assert moved(store) == {"disk, int8": 2 * places[0], "disk, int4": 2 * places[1]}
    assert traffic.hit_rate == 1
    sizes = (store.fine.expert_bytes, store.coarse.expert_bytes)
    assert traffic.bytes_moved == 2 * sum(a * b for a, b in zip(places, sizes, strict=True))


@needs_kernels
def test_an_evaluation_knows_its_coarse_experts_wherever_they_lie(tmp_path: Path) -> None:
    fine, coarse = folders(tmp_path, ("int8", "int4"))
    asked = [Memory.parse("75%", coarse=Coarse(coarse))]
    moved_to = coarse.rename(tmp_path / "elsewhere")
    asked.append(Memory.parse("75%", coarse=Coarse(moved_to)))
    coarse.symlink_to(moved_to)
    found = [about(opened(fine, memory), [])["memory"] for memory in asked]
    assert found[0] == found[1]
    config = moved_to / "config.json"
    config.write_text(config.read_text() + "\n")
    assert about(opened(fine, asked[0]), [])["memory"] != found[0]


@needs_kernels
def test_two_folders_that_are_not_one_model_are_refused(tmp_path: Path) -> None:
    fine, coarse = folders(tmp_path / "a", ("int8", "int4"))
    other = write_checkpoint(tmp_path / "seed", "llada2", seed=1, dtype=torch.bfloat16)
    wider = write_checkpoint(tmp_path / "b", "llada2", vocab_size=100, dtype=torch.bfloat16)
    convert(other, tmp_path / "seed-int4", Aim.of("int4"))
    convert(wider, tmp_path / "wider-int4", Aim.of("int4"))
    for first, second, told in (
        (fine, tmp_path / "seed-int4", "not made of the same weights"),
        (fine, tmp_path / "wider-int4", "vocab_size is 100, not 96"),
        (coarse, fine, "are not smaller"),
        (fine, other, "packed checkpoint"),
    ):
        with pytest.raises(CoterieError, match=told):
            opened(first, Memory.parse("35%", coarse=Coarse(second)))
    for folder in (tmp_path / "seed-int4", coarse):  # where no source is told, weights decide
        listed = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**listed, "source": None}))
    with pytest.raises(CoterieError, match="not made of the same weights"):
        opened(fine, Memory.parse("35%", coarse=Coarse(tmp_path / "seed-int4")))
    assert mixed_of(opened(fine, Memory.parse("35%", coarse=Coarse(coarse))))


@needs_kernels
@pytest.mark.parametrize(
    ("memory", "placement", "told"),
    [
        ("35%", "votes", "--warm FILE"),
        ("100%", "upgrades", "--coarse has no effect"),
        ("1", "upgrades:share=0.5", "less than one of each"),
        ("35%", "upgrades:share=1", "share must be at least 0.01"),
        ("35%", "upgrades:most=0", "most must be at least 1"),
        ("35%", "best", "unknown placement 'best'; known: ballot, upgrades, votes"),
    ],
)
def test_two_precisions_that_cannot_be_had_are_refused(
    tmp_path: Path, memory: str, placement: str, told: str
) -> None:
    fine, few = folders(tmp_path, ("int8", "int4"))
    with pytest.raises(CoterieError, match=told):
        opened(fine, Memory.parse(memory, coarse=Coarse.parse(str(few), placement)))


@given(st.integers(1, 300), st.floats(0.01, 0.99), st.integers(2, 40), st.integers(1, 39))
@law(100)
def test_a_split_stays_inside_its_memory(
    room: int, share: float, experts: int, coarse: int
) -> None:
    fine = 40
    try:
        split = Split.of(room * 10, share, experts=experts, fine=fine, coarse=coarse)
    except CoterieError:
        return
    assert split.fine * fine + split.coarse * coarse <= room * 10
    assert split.fine >= 1
    assert split.coarse >= 1
    assert split.fine + split.coarse <= experts
    assert split.fine >= min(experts - 1, int(share * room * 10) // fine) or (
        split.fine + split.coarse == experts
    )


@needs_kernels
def test_the_command_says_which_precision_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, coarse = folders(tmp_path, ("int8", "int4"))
    words = ["generate", "5 17 33", "-m", str(fine), "-n", "8", "--block", "8", "--json"]
    words += ["--expert-memory", "50%", "--coarse", str(coarse), "--placement", "upgrades:most=1"]
    assert run(words) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    precision, traffic = told["expert_precision"], told["expert_traffic"]
    slots = precision["fine_slots"], precision["coarse_slots"]
    assert f"{slots[0]} of 16 experts a layer in int8 and {slots[1]} in int4" in said.err
    assert traffic["slots"] == sum(slots)
    assert set(traffic["bytes_moved_from"]) == {"disk, int8", "disk, int4"}
    assert (precision["fine"], precision["coarse"]) == ("int8", "int4")
    assert precision["votes_fine"] + precision["votes_coarse"] == pytest.approx(1)
    assert 0 < precision["loss_bound"] < 1
    listed = json.loads((coarse / MANIFEST).read_text())
    for tensor in listed["tensors"].values():
        tensor.pop("error", None)
    (coarse / MANIFEST).write_text(json.dumps(listed))
    assert run(words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["expert_precision"]["loss_bound"] is None
    assert "does not tell what its experts lost" in said.err


@needs_kernels
def test_an_option_of_two_precisions_without_them_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, coarse = folders(tmp_path, ("int8", "int4"))
    for options, told in (
        (["--coarse", str(coarse)], "--coarse has no effect"),
        (["--expert-memory", "35%", "--placement", "votes"], "--placement has no effect without"),
    ):
        assert run(["generate", "5 17", "-m", str(fine), *options]) == 2
        said = capsys.readouterr()
        assert told in said.err
        assert said.err.count("\n") == 1
