"""Replays over a grid: policies x caches x capacities x precisions x links, from one trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from coterie.experts.capacity import Capacity
from coterie.experts.eviction import EVICTIONS, Eviction, parse_eviction
from coterie.experts.traffic import Traffic
from coterie.naming import CoterieError
from coterie.planning.booking import (
    Booked,
    Cache,
    Chosen,
    Memory,
    Play,
    Votes,
    asks_residents,
    asks_slots,
    book,
    choose,
)
from coterie.planning.elections import Fidelity, fidelity
from coterie.planning.machine import Clock, Machine, clock
from coterie.planning.overlap import Overlap, overlap
from coterie.planning.trace import Trace
from coterie.routing import Vanilla

BELADY = "belady"
CACHES = (*EVICTIONS, BELADY)
YARDSTICK = "lru"  # under which vanilla is compared with
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Grid:
    """What is asked: every combination is replayed."""

    plays: Sequence[Play]
    caches: Sequence[str]
    capacities: Sequence[Capacity]
    sizes: Mapping[str, int]  # bytes of an expert, by precision
    links: Mapping[str, Machine]  # by what was typed
    warm: Votes | None = None

    def cases(self) -> list[Case]:
        """Every combination, links turning fastest."""
        every = product(self.plays, self.caches, self.capacities, self.sizes, self.links)
        return [Case(*case) for case in every]


@dataclass(frozen=True)
class Case:
    """One point of a grid."""

    play: Play
    cache: str
    capacity: Capacity
    precision: str
    link: str


@dataclass(frozen=True)
class Replayed:
    """What became of a case; ``clock`` is a prediction, all else is counted."""

    case: Case
    fidelity: Fidelity
    slots: int
    experts: float  # used of a layer, in a forward that decodes
    loads: float  # of these, those that had to come
    traffic: Traffic  # of all forwards, those that decode and those that only write keys
    clock: Clock
    votes_kept: float
    coresets_kept: float | None  # with drift: of a block's later steps, how many kept theirs

    def document(self) -> dict[str, object]:
        """Flat; bytes are of all forwards, or laid on each one that decodes."""
        case, traffic = self.case, self.traffic
        return {
            "policy": str(case.play),
            "replayed": self.fidelity,
            "cache": case.cache,
            "capacity": case.capacity.text,
            "slots": self.slots,
            "precision": case.precision,
            "link": case.link,
            "forwards": traffic.forwards,
            "experts": self.experts,
            "loads": self.loads,
            "hit_rate": traffic.hit_rate,
            "bytes_moved": traffic.bytes_moved,
            "bytes_a_forward": traffic.bytes_moved / traffic.forwards,
            "bytes_avoided": traffic.bytes_avoided,
            "bytes_avoided_against_vanilla": traffic.bytes_avoided_against_vanilla,
            "saved_against_vanilla": traffic.saved,
            "ms": 1e3 * self.clock.forward,
            "stall_ms": 1e3 * self.clock.stall,
            "votes_kept": self.votes_kept,
            "coresets_kept": self.coresets_kept,
        }


@dataclass(frozen=True)
class Replay:
    """The grid's points in its order, and how alike steps are under each policy."""

    points: tuple[Replayed, ...]
    overlaps: Mapping[str, Overlap]
    steps_per_block: float


def replay(trace: Trace, grid: Grid, told: Told | None = None) -> Replay:
    """Replay it all; ``told`` hears (points done, points in all).

    Raises CoterieError, before anything is replayed, for what the trace cannot say.
    """
    check(grid)
    faiths: dict[str, Fidelity] = {str(play): fidelity(play.policy) for play in grid.plays}
    rules = {cache: eviction_of(cache) for cache in (*grid.caches, YARDSTICK)}
    slots = {case: slots_of(trace, grid, case) for case in grid.cases()}
    books = Books(Memory.of(trace), grid.warm, rules)
    points: list[Replayed] = []
    seen: dict[str, Chosen] = {}
    for case, many in slots.items():
        booked = books.of(case.play, case.cache, many)
        vanilla = books.of(Play(Vanilla()), YARDSTICK, many)
        # Where what is in fast memory changes a coreset, the first cache's stands for the policy's.
        seen.setdefault(str(case.play), booked.chosen)
        size, decoding = grid.sizes[case.precision], books.memory.decoding
        machine, steps = grid.links[case.link], booked.chosen.steps
        point = Replayed(
            case,
            faiths[str(case.play)],
            many,
            experts=float(booked.used[decoding].mean()),
            loads=float(booked.loads[decoding].mean()),
            traffic=traffic(booked, vanilla, size, forwards=int(decoding.sum())),
            clock=clock(machine, booked.used, booked.loads, size, decoding=int(decoding.sum())),
            votes_kept=votes_kept(books.memory, booked.chosen),
            coresets_kept=booked.chosen.kept / steps if steps else None,
        )
        points.append(point)
        if told is not None:
            told(len(points), len(slots))
    overlaps = {name: overlap(books.memory, chosen.used) for name, chosen in seen.items()}
    return Replay(tuple(points), overlaps, steps_per_block(trace))


def check(grid: Grid) -> None:
    """Raises for what nobody could replay: an optimum over what is not known beforehand."""
    for play in grid.plays:
        if BELADY in grid.caches and asks_residents(play):
            raise CoterieError(
                f"{play} elects by what is in fast memory, so that nobody can know whom it will "
                f"use: {BELADY} cannot be replayed with it; leave one of the two out"
            )


@dataclass  # not frozen: it keeps what was played
class Books:
    """Every policy and cache, played once."""

    memory: Memory
    warm: Votes | None
    rules: Mapping[str, Eviction | None]
    _chosen: dict[tuple[str, int | None], Chosen | None] = field(default_factory=dict)
    _booked: dict[tuple[str, str, int], Booked] = field(default_factory=dict)

    def of(self, play: Play, cache: str, slots: int) -> Booked:
        name, room = str(play), slots if asks_slots(play) else None
        if (name, room) not in self._chosen:
            chosen = None if asks_residents(play) else choose(self.memory, play, room)
            self._chosen[name, room] = chosen
        key = (name, cache, slots)
        if key not in self._booked:
            held = Cache(self.rules[cache], slots, self.warm)
            self._booked[key] = book(self.memory, play, self._chosen[name, room], held)
        return self._booked[key]


def eviction_of(cache: str) -> Eviction | None:
    """The rule; None for Belady's optimum, which is of what it is replayed with."""
    return None if cache == BELADY else parse_eviction(cache)


def slots_of(trace: Trace, grid: Grid, case: Case) -> int:
    """Of each layer, in this case."""
    layers, experts = len(trace.about.layers), trace.about.experts
    return case.capacity.slots(layers=layers, experts=experts, size=grid.sizes[case.precision])


def traffic(booked: Booked, vanilla: Booked, size: int, *, forwards: int) -> Traffic:
    """Of all forwards and layers, where an expert weighs ``size`` and so many forwards decode."""
    used, moved, usual = (int(x.sum()) for x in (booked.used, booked.loads, vanilla.loads))
    return Traffic.counted(forwards, size, used=used, moved=moved, vanilla=usual)


def votes_kept(memory: Memory, chosen: Chosen) -> float:
    """Share of all votes, of forwards that decode, that are for experts used."""
    decode = [at for at, one in enumerate(memory.trace.forwards) if one.kind == "decode"]
    held = sum((memory.votes[at] * chosen.used[at]).sum() for at in decode)
    return float(held / sum(memory.votes[at].sum() for at in decode))


def steps_per_block(trace: Trace) -> float:
    """Decoding forwards that a block took in the run."""
    decode = [forward for forward in trace.forwards if forward.kind == "decode"]
    return len(decode) / len({(forward.row, forward.block) for forward in decode})


def decoding_only(trace: Trace) -> Trace:
    """Without the forwards that only write keys."""
    kept = tuple(forward for forward in trace.forwards if forward.kind == "decode")
    return replace(trace, forwards=kept)
