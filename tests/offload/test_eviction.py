"""Slots and who leaves them: nothing is lost, nobody needed leaves, and Belady is the optimum."""

from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.errors import CoterieError
from coterie.offload.eviction import (
    EVICTIONS,
    NEVER_USED,
    Belady,
    ByVotes,
    CacheAccess,
    Eviction,
    Lfu,
    Lru,
    Mask,
    parse_eviction,
)
from coterie.offload.slot_table import EMPTY, Slots

Sets = list[frozenset[int]]


@st.composite
def histories(draw: st.DrawFn, experts: int = 12, longest: int = 14) -> tuple[int, Sets]:
    """How many experts there are, and whom each forward uses."""
    size = draw(st.integers(1, experts))
    one = st.frozensets(st.integers(0, size - 1))
    return size, draw(st.lists(one, min_size=1, max_size=longest))


def mask(size: int, members: frozenset[int]) -> Mask:
    made = np.zeros(size, dtype=bool)
    made[list(members)] = True
    return made


def rules(size: int, sets: Sets) -> list[Eviction]:
    future = [mask(size, members) for members in sets]
    return [Lru(), Lfu(), ByVotes(), ByVotes(decay=0.3), Belady.from_uses(future)]


def loads(size: int, capacity: int, rule: Eviction, sets: Sets) -> int:
    slots = Slots(size, capacity, rule)
    waves = [wave for used in sets for wave in slots.serve(mask(size, used), votes(size, used))]
    return sum(len(wave.loads) for wave in waves)


def votes(size: int, used: frozenset[int]) -> np.ndarray:
    """Some that say more than who was used."""
    return np.array([((7 * e + 3) % 5) / 5 + (e in used) for e in range(size)])


@given(histories(), st.integers(1, 14), st.booleans())
@law(60)
def test_every_used_expert_is_served_once_from_its_slot(drawn, capacity: int, warm):
    """A second book, kept from the loads alone, agrees at every wave."""
    size, sets = drawn
    for rule in rules(size, sets):
        slots = Slots(size, capacity, rule, votes(size, frozenset()) if warm else None)
        held = dict(enumerate(slots.expert_of))
        for used in sets:
            served = []
            for wave in slots.serve(mask(size, used), votes(size, used)):
                assert set(held.values()).isdisjoint(expert for expert, _ in wave.loads)
                for expert, slot in wave.loads:
                    held[slot] = expert
                assert set(wave.experts) <= set(held.values())
                served += wave.experts
            assert sorted(served) == sorted(used)
            assert [held[slot] for slot in range(min(capacity, size))] == slots.expert_of
            assert slots.num_resident == slots.resident.sum()
            assert slots.holds_all(np.ones(size, dtype=bool)) == bool(slots.resident.all())


@given(histories(), st.integers(1, 14))
@law()
def test_capacity_is_never_exceeded_and_what_fits_stays(drawn, capacity: int):
    size, sets = drawn
    for rule in rules(size, sets):
        slots = Slots(size, capacity, rule)
        for used in sets:
            before = {e for e in slots.expert_of if e != EMPTY}
            waves = slots.serve(mask(size, used), votes(size, used))
            after = [e for e in slots.expert_of if e != EMPTY]
            assert len(after) == len(set(after)) == min(len(before | used), capacity, size)
            assert set(np.flatnonzero(slots.resident).tolist()) == set(after)
            if len(used) <= capacity:
                assert used <= set(after)
                assert sum(bool(wave.loads) for wave in waves) <= 1
            else:
                assert set(after) < used


@given(histories(), st.integers(1, 14))
@law()
def test_cached_experts_are_not_loaded(drawn, capacity: int):
    size, sets = drawn
    for rule in rules(size, sets):
        slots = Slots(size, capacity, rule)
        for used in sets:
            missing = used - {e for e in slots.expert_of if e != EMPTY}
            moved = [e for wave in slots.serve(mask(size, used)) for e, _ in wave.loads]
            assert sorted(moved) == sorted(missing)


@given(histories(), st.integers(1, 14))
@law(60)
def test_no_rule_misses_less_than_belady(drawn, capacity: int):
    size, sets = drawn
    *others, best = rules(size, sets)
    least = loads(size, capacity, best, sets)
    assert all(loads(size, capacity, rule, sets) >= least for rule in others)


@given(histories(experts=5, longest=6), st.integers(1, 4))
@law(50)
def test_belady_is_optimal_where_each_forward_fits(drawn, capacity: int):
    """Every set that may stay is tried, where each forward fits: its waves add no misses."""
    size, sets = drawn
    capacity = max(capacity, *(len(used) for used in sets))

    @cache
    def least(clock: int, here: frozenset[int]) -> int:
        if clock == len(sets):
            return 0
        used = sets[clock]
        moved = len(used - here)
        return moved + min(least(clock + 1, kept) for kept in stays(here, used, capacity))

    best = Belady.from_uses([mask(size, members) for members in sets])
    assert loads(size, capacity, best, sets) == least(0, frozenset())


def stays(here: frozenset[int], used: frozenset[int], capacity: int) -> list[frozenset[int]]:
    """The sets that may be here after a forward: as full as can be, its own experts first; who
    was loaded last is among them."""
    if len(used) > capacity:
        chosen = map(frozenset, combinations(sorted(used), capacity))
        return [kept for kept in chosen if kept - here]
    rest = sorted(here - used)
    many = min(len(rest), capacity - len(used))
    return [used | frozenset(others) for others in combinations(rest, many)]


@given(histories())
@law()
def test_more_slots_hold_all_that_fewer_hold_under_lru(drawn):
    """The stack property, for capacities that every forward fits."""
    size, sets = drawn
    fits = range(max(1, *(len(used) for used in sets)), size + 1)
    caches = [Slots(size, capacity, Lru()) for capacity in fits]
    for used in sets:
        for slots in caches:
            slots.serve(mask(size, used))
        for few, many in pairwise(caches):
            assert not (few.resident & ~many.resident).any()


@given(histories())
@law()
def test_with_room_for_all_each_expert_moves_once(drawn):
    size, sets = drawn
    for rule in rules(size, sets):
        assert loads(size, size, rule, sets) == len(frozenset().union(*sets))


def test_evicted_experts_by_hand() -> None:
    """Three slots hold 0, 1, 2; then 3 comes. 0 was used thrice, 1 last, 2 is voted for."""
    sets = [frozenset({0, 1, 2}), frozenset({0}), frozenset({0}), frozenset({1})]
    ballots = [np.array(v, dtype=float) for v in ([1, 1, 1, 0], [1, 0, 9, 0], [1, 0, 9, 0])]
    gone = {}
    for name in EVICTIONS:
        slots = Slots(4, 3, parse_eviction(name))
        for used, ballot in zip(sets, [*ballots, np.array([0, 1, 9, 0.0])], strict=True):
            slots.serve(mask(4, used), ballot)
        slots.serve(mask(4, frozenset({3})), np.array([0, 0, 9, 1.0]))
        (gone[name],) = {0, 1, 2} - set(slots.expert_of)
    assert gone == {"lru": 2, "lfu": 2, "votes": 1}


def test_of_equals_the_higher_index_leaves() -> None:
    for rule in (Lru(), Lfu(), ByVotes()):
        slots = Slots(4, 3, rule)
        slots.serve(mask(4, frozenset({0, 1, 2})), np.array([1, 1, 1, 0.0]))
        assert slots.serve(mask(4, frozenset({3})))[0].loads == ((3, 2),)


def test_five_experts_pass_through_three_slots() -> None:
    """0 and 1 are here and stay, for lower indices do: the others take turns in the third."""
    slots = Slots(6, 3, Lru())
    slots.serve(mask(6, frozenset({0, 1})))
    waves = slots.serve(mask(6, frozenset({0, 1, 2, 3, 4})))
    assert [wave.experts for wave in waves] == [(0, 1), (3,), (4,), (2,)]
    assert [wave.loads for wave in waves] == [(), ((3, 2),), ((4, 2),), ((2, 2),)]
    assert slots.expert_of == [0, 1, 2]


def test_slots_start_with_the_most_voted() -> None:
    known = np.array([0.0, 3, 0, 5, 5, 1])
    assert Slots(6, 3, Lru(), known).expert_of == [3, 4, 1]
    assert Slots(6, 6, Lru(), known).expert_of == [3, 4, 1, 5, EMPTY, EMPTY]
    slots = Slots(6, 3, Lru(), known)
    assert slots.serve(mask(6, frozenset({0})))[0].loads == ((0, 2),)  # 1 had the fewest votes


def test_belady_needs_the_uses_of_every_forward() -> None:
    rule = Belady.from_uses([mask(2, frozenset({0})), mask(2, frozenset({1}))])
    assert rule.next_uses.tolist() == [[NEVER_USED, 1.0], [NEVER_USED, NEVER_USED]]
    with pytest.raises(CoterieError, match="only 2 forwards"):
        rule.updated_scores(np.zeros(2), CacheAccess(2, mask(2, frozenset()), np.zeros(2)))


def test_refusals_say_what_would_have_worked() -> None:
    with pytest.raises(CoterieError, match="at least one"):
        Slots(4, 0, Lru())
    with pytest.raises(CoterieError, match="known: lfu, lru, votes"):
        parse_eviction("fifo")
    with pytest.raises(CoterieError, match="decay"):
        parse_eviction("votes:decay=0")
