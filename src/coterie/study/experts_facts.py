"""What the record of experts that do not fit holds, and how it is read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypedDict, cast

from coterie.study.tally import Document, Tally

SHARES: tuple[str, ...] = ("100%", "50%", "35%", "25%", "12%")
MAIN = "35%"  # where commits are compared, and rules that prefer residents answer more
LINKS = {"25GB/s": "PCIe 4 x16", "3GB/s": "a fast disk"}

Ratio = list[float]  # value, and the 95 % interval's ends


class Precision(TypedDict):
    """``dtype`` is that of everything but the experts."""

    name: str
    dtype: str
    expert_bytes: int


class Kept(TypedDict):
    """One memory of one run: experts used and brought by all its forwards, and by those that
    decode; bytes against vanilla's and against the same run in 16 bits, None where there is no
    such run or nothing need move. ``ms``: of an answer, by link, as the replay's clock has it."""

    share: str
    slots: int
    used: int
    moved: int
    moved_decoding: int
    to_vanilla: Ratio | None
    to_whole: Ratio | None
    ms: dict[str, float]


class Run(TypedDict):
    """One policy in one precision; ``passes`` are all forwards of an answer, ``decoding`` those
    that denoise, and the ratios are of these."""

    precision: str
    policy: str
    commit: str  # "" where no block is committed apart
    looks: bool  # whether it is told who is in memory; then it has one memory
    items: int
    tally: Document
    passes: float
    decoding: float
    to_vanilla: Ratio
    to_whole: Ratio | None
    kept: list[Kept]


class Found(TypedDict):
    experts: int
    k: int
    layers: int
    block: int
    main: str
    commits: bool
    precisions: list[Precision]
    left_out: list[dict[str, str]]
    runs: list[Run]


@dataclass(frozen=True)
class Point:
    """One policy, one memory, one precision."""

    run: Run
    kept: Kept
    tally: Tally
    vanilla: Tally  # of the same precision, on the same items
    bytes: float  # moved, of an answer

    @property
    def policy(self) -> str:
        return self.run["policy"]

    @property
    def hit_rate(self) -> float:
        return 1 - self.kept["moved"] / self.kept["used"] if self.kept["used"] else 1.0

    @property
    def saved(self) -> Ratio | None:
        """Of vanilla's bytes, the share that was not moved, and its interval."""
        to = self.kept["to_vanilla"]
        return None if to is None else [1 - to[0], 1 - to[2], 1 - to[1]]


@dataclass(frozen=True)
class Grid:
    """The record, read back."""

    found: Found
    points: tuple[Point, ...]

    @staticmethod
    def of(facts: Mapping[str, object]) -> Grid:
        found = cast("Found", facts)
        return Grid(found, tuple(_points(found)))

    def at(self, precision: str, share: str | None = None, commit: str = "policy") -> list[Point]:
        """In the record's order, vanilla first; where no block is committed apart, all."""
        return [
            point
            for point in self.points
            if point.run["precision"] == precision
            and share in (None, point.kept["share"])
            and point.run["commit"] in ("", commit)
        ]

    @property
    def first(self) -> str:
        """The precision that others are held against."""
        return self.found["precisions"][0]["name"]

    def like(self, point: Point, precision: str) -> Point | None:
        """The same run and memory in another precision."""
        for other in self.points:
            same = all(other.run[name] == point.run[name] for name in ("policy", "commit"))
            there = other.run["precision"] == precision
            if same and there and other.kept["share"] == point.kept["share"]:
                return other
        return None


def head(tally: Tally, like: Tally) -> Tally:
    """Its first answers, as many of each task as the other has."""
    right = {task: bits[: len(like.right.get(task, ""))] for task, bits in tally.right.items()}
    return replace(tally, right={task: bits for task, bits in right.items() if bits})


def _points(found: Found) -> Iterator[Point]:
    sizes = {one["name"]: one["expert_bytes"] for one in found["precisions"]}
    plain: dict[str, Tally] = {}
    for run in found["runs"]:
        tally = Tally.of(run["tally"])
        vanilla = plain.setdefault(run["precision"], tally)
        for kept in run["kept"]:
            size = kept["moved"] * sizes[run["precision"]] / run["items"]
            yield Point(run, kept, tally, head(vanilla, tally), size)
