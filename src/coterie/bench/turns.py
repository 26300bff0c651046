"""Works in turns: ours, a plain read of the same bytes, and those of the peers' processes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from coterie import ops
from coterie.bench.peers import Chosen, PeerError, Worker
from coterie.bench.reading import memory_of, read_rows, rows_of
from coterie.bench.shapes import Published
from coterie.results import Measure
from coterie.values import Routing, Slab

DRAWS = 4  # routings that take turns
SWEPT = 128 << 20  # bytes read before each work, so that it finds nothing of its own in a cache
LEAST, ENOUGH = 3, 4.0  # turns at least, and seconds in all after which a slow work rests
LIMITS = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.06, "int4": 0.3}
"""Relative error from which a peer computes something else."""

READ, OURS = "read", "ours"
Dtype: TypeAlias = Literal["fp32", "bf16", "int8", "int4"]
Tell: TypeAlias = Callable[[float, str], None]  # the share that is done, what is being done
Cases: TypeAlias = Mapping[str, Sequence[tuple[Tensor, Routing]]]
"""By policy, so many blocks as there are draws: x [T, H] and who computes it."""


@dataclass(frozen=True)
class Asked:
    """What is timed. ``even``: routers that prefer nobody, in place of skewed ones."""

    shape: Published
    dtype: Dtype
    policies: tuple[str, ...]
    tokens: int = 32
    turns: int = 40
    threads: int = 1
    even: bool = False
    seed: int = 7


@dataclass(frozen=True)
class Line:
    """One policy: experts and bytes of a turn, and every work's samples in seconds.

    ``beside`` are ours in the very turns in which a work had its samples: ratios are of pairs.
    """

    policy: str
    experts: float
    bytes: float
    samples: dict[str, list[float]]
    beside: dict[str, list[float]]

    def ratio(self, work: str) -> float:
        """How many times as long as ours it takes: the median over turns."""
        pairs = zip(self.samples[work], self.beside[work], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def median(self, work: str) -> float:
        return statistics.median(self.samples[work])

    def measures(self) -> list[Measure]:
        return [
            Measure(f"{self.policy} {work}", "ms", tuple(second * 1e3 for second in taken))
            for work, taken in self.samples.items()
        ]

    def facts(self) -> dict[str, object]:
        read = self.median(READ)
        others = [work for work in self.samples if work not in (READ, OURS)]
        return {
            "policy": self.policy,
            "experts": self.experts,
            "bytes": self.bytes,
            "read_gb_per_s": self.bytes / read / 1e9,
            "ours_ms": self.median(OURS) * 1e3,
            "share_of_read_limit": self.ratio(READ),
            "times_ours": {work: self.ratio(work) for work in others},
            "ours_ms_beside": {work: statistics.median(self.beside[work]) * 1e3 for work in others},
        }


@dataclass  # not frozen: it gathers
class Found:
    """What came of it. ``errors`` of works are relative to ours; of llama.cpp, to fp32."""

    lines: list[Line]
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sittings: list[list[str]] = field(default_factory=list)


@dataclass  # not frozen: it keeps account of who still takes part
class Sitting:
    """Some peers at work beside us."""

    asked: Asked
    slab: Slab
    cases: Cases
    found: Found
    folder: Path
    slow: bool
    works: dict[str, tuple[Chosen, Worker, str]] = field(default_factory=dict)
    spent: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = rows_of(memory_of([self.slab.gate_up, self.slab.down]))
        self.broom = rows_of([torch.ones(1, SWEPT, dtype=torch.uint8)])

    def open(self, group: Sequence[Chosen], stack: ExitStack, tell: Tell) -> None:
        """Start the peers, one after the other, and compare what they compute."""
        for who in group:
            tell(0.0, f"starting {who.peer.name}")
            try:
                threads = self.asked.threads
                started = stack.enter_context(Worker(who, self.folder, threads=threads))
                started.open()
                self._welcome(who, started)
            except PeerError as error:
                self._leave_out(who, error)
        self.found.sittings.append(sorted({who.peer.name for who, _, _ in self.works.values()}))

    def take_turns(self, tell: Tell) -> None:
        """The first turns, one for each draw, are not kept."""
        draw, turns = random.Random(0), self.asked.turns + DRAWS
        for turn in range(turns):
            for line in self.found.lines:
                self._turn(line, turn, draw)
            tell((turn + 1) / turns, "taking turns")

    def _turn(self, line: Line, turn: int, draw: random.Random) -> None:
        """Every work once, on one routing, in an order drawn anew."""
        number = turn % DRAWS
        x, routing = self.cases[line.policy][number]
        case = self.asked.policies.index(line.policy) * DRAWS + number
        order = [READ, OURS, *(work for work in self.works if not self._rests(work, line, turn))]
        draw.shuffle(order)
        taken: dict[str, float] = {}
        for work in order:
            read_rows(self.broom, torch.tensor([True]))
            if work in (READ, OURS):
                taken[work] = self._ours(work, x, routing)
            elif work in self.works:  # its peer may have gone meanwhile
                who, at_work, name = self.works[work]
                try:
                    taken[work] = at_work.time(name, case)
                except PeerError as error:
                    self._leave_out(who, error)
        for work, seconds in taken.items():
            self.spent.setdefault((line.policy, work), []).append(seconds)
            if turn >= DRAWS and (work in self.works or work in (READ, OURS)):
                line.samples.setdefault(work, []).append(seconds)
                line.beside.setdefault(work, []).append(taken[OURS])

    def _ours(self, work: str, x: Tensor, routing: Routing) -> float:
        began = time.perf_counter()
        if work == READ:
            read_rows(self.rows, routing.used)
        else:
            ops.run_experts(x, routing, self.slab)
        return time.perf_counter() - began

    def _rests(self, work: str, line: Line, turn: int) -> bool:
        """Whether a slow work has had its share."""
        spent = self.spent.get((line.policy, work), [])
        return len(spent) >= LEAST and turn >= DRAWS + LEAST and sum(spent) > ENOUGH

    def _welcome(self, who: Chosen, started: Worker) -> None:
        self.found.versions[who.peer.name] = started.versions
        for name in started.works:
            if name in who.peer.slow and not self.slow:
                continue
            label = f"{who.peer.name} {name}"
            self.found.errors[label] = self._error(who, started, name)
            self.works[label] = (who, started, name)

    def _error(self, who: Chosen, started: Worker, name: str) -> float:
        """Relative to ours, or as it says itself; the largest over one case of each policy."""
        cases = range(0, len(self.asked.policies) * DRAWS, DRAWS)
        if who.peer.shows:
            file = self.folder / f"{who.peer.name}.npy"
            worst = max(self._off(case, started.output(name, case, file)) for case in cases)
        else:
            worst = max(started.error(name, case) for case in cases)
        if not worst <= LIMITS[self.asked.dtype]:  # NaN is beyond any limit
            raise PeerError(f"{who.peer.name} {name} computes something else: off by {worst:.1%}")
        return worst

    def _off(self, case: int, theirs: np.ndarray) -> float:
        """Infinite where not even the shape is right."""
        x, routing = self.cases[self.asked.policies[case // DRAWS]][case % DRAWS]
        ours = ops.run_experts(x, routing, self.slab)
        if theirs.shape != tuple(ours.shape) or not np.isfinite(theirs).all():
            return float("inf")
        return float((torch.from_numpy(theirs) - ours).norm() / ours.norm())

    def _leave_out(self, who: Chosen, error: PeerError) -> None:
        if who.asked:
            raise error
        self.found.skipped[who.peer.name] = str(error)
        self.found.versions.pop(who.peer.name, None)
        for names in self.found.sittings:
            if who.peer.name in names:
                names.remove(who.peer.name)
        for label in [label for label, (other, _, _) in self.works.items() if other is who]:
            del self.works[label]
            del self.found.errors[label]
            for line in self.found.lines:
                line.samples.pop(label, None)
                line.beside.pop(label, None)
