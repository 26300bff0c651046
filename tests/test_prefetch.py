"""Experts brought before they are asked for, on paper: nobody is lost, nobody counts twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import law
from test_replay import drawn, play

from coterie.experts.eviction import Lru
from coterie.planning.booking import (
    CacheConfig,
    TraceVotes,
    depends_on_residents,
    replay_cache,
    select_experts,
)
from coterie.planning.machine import HardwareModel, predict_time
from coterie.planning.prefetch import (
    Guess,
    Nobody,
    Together,
    Told,
    Voted,
    brought,
    foreseen,
    play_ahead,
)

MACHINE = HardwareModel(
    link_bandwidth=1000.0, memory_bandwidth=4000.0, other_seconds=0.2, transfer_latency=0.01
)
SLOTS = 9


def ahead(policy: str, guess: Guess, *, shelf: int, machine: HardwareModel = MACHINE):
    memory, asked = TraceVotes.of(drawn()), play(policy)
    chosen = None if depends_on_residents(asked) else select_experts(memory, asked)
    sizes = {"slots": SLOTS, "shelf": shelf, "machine": machine, "size": 100}
    return memory, chosen, play_ahead(memory, asked, chosen, guess, **sizes)


@pytest.mark.parametrize("policy", ["vanilla", "des-vote:beta=0.3", "resident-vote:beta=0.3"])
def test_without_guesses_it_is_the_replay(policy: str) -> None:
    memory, chosen, found = ahead(policy, Nobody(), shelf=0)
    booked = replay_cache(memory, play(policy), chosen, CacheConfig(Lru(), SLOTS))
    assert np.array_equal(found.waited, booked.loads)
    assert np.array_equal(found.used, booked.used)
    assert found.moved == booked.loads.sum()
    foretold = predict_time(
        MACHINE, booked.used, booked.loads, 100, decode_forwards=len(booked.used)
    )
    assert found.seconds == pytest.approx(foretold.forward_seconds * len(booked.used))


@pytest.mark.parametrize("guess", [Voted(0.0), Voted(0.8), Together()])
@pytest.mark.parametrize("shelf", [1, 4])
def test_whoever_is_needed_came_once_early_or_late(guess: Guess, shelf: int) -> None:
    """The slots that are left miss as many; who lay on the shelf is not waited for."""
    memory, chosen, found = ahead("des-vote:beta=0.3", guess, shelf=shelf)
    fewer = replay_cache(
        memory, play("des-vote:beta=0.3"), chosen, CacheConfig(Lru(), SLOTS - shelf)
    )
    assert np.array_equal(found.waited + found.useful, fewer.loads)
    assert found.useful.sum() <= found.early.sum()
    assert found.early.sum() > 0


def test_the_truth_is_always_useful_and_saves_most() -> None:
    _, chosen, _ = ahead("des-vote:beta=0.3", Nobody(), shelf=0)
    assert chosen is not None
    truth = Told(chosen.used.astype(np.float64))
    _, _, found = ahead("des-vote:beta=0.3", truth, shelf=3)
    assert found.early.sum() == found.useful.sum() > 0
    for guess in (Voted(0.8), Together()):
        _, _, other = ahead("des-vote:beta=0.3", guess, shelf=3)
        assert found.waited.sum() <= other.waited.sum()
    hurried = HardwareModel(link_bandwidth=1e-9, memory_bandwidth=4000.0)
    _, _, found = ahead("des-vote:beta=0.3", truth, shelf=3, machine=hurried)
    assert found.early.sum() == 0  # the link is never free


@given(
    st.sets(st.integers(0, 9), max_size=4), st.permutations(range(10)), st.integers(0, 4), st.data()
)
@law(60)
def test_a_shelf_holds_who_is_wanted_as_far_as_they_could_come(lie, order, many, data) -> None:
    places = data.draw(st.integers(max(1, len(lie), many), 6))
    wanted = order[:many]
    room = data.draw(st.integers(0, places))
    shelf, came = brought(set(lie), wanted, room, places)
    missing = [one for one in wanted if one not in lie]
    assert came == min(room, len(missing))
    assert shelf >= (set(wanted) & lie) | set(missing[:came])
    assert shelf <= lie | set(missing[:came])
    assert len(shelf) == min(places, len(lie) + came)


def test_nobody_is_foreseen_who_is_there_or_was_never_voted_for() -> None:
    scores = np.array([3.0, 1.0, 0.0, 3.0, 2.0])
    here = np.array([True, False, False, False, False])
    assert foreseen(scores, here, 4) == [3, 4, 1]
    assert foreseen(scores, here, 1) == [3]
