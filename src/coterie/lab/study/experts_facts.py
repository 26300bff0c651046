"""What the record of experts that do not fit holds, and how it is read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypedDict, cast

from coterie.lab.study.results import JsonObject, VariantResult

MEMORY_SHARES: tuple[str, ...] = ("100%", "50%", "35%", "25%", "12%")
MAIN_SHARE = "35%"  # where commits are compared, and rules that prefer residents answer more
LINKS = {"25GB/s": "PCIe 4 x16", "3GB/s": "a fast disk"}

RatioWithInterval = list[float]  # value, and the 95 % interval's ends


class PrecisionInfo(TypedDict):
    """``dtype`` is that of everything but the experts."""

    name: str
    dtype: str
    expert_bytes: int


class CacheOutcome(TypedDict):
    """One memory of one run: experts used and brought by all its forwards, and by those that
    decode; bytes against vanilla's and against the same run in 16 bits, None where there is no
    such run or nothing need move. ``ms``: of an answer, by link, as the replay's clock has it."""

    share: str
    slots: int
    used: int
    moved: int
    moved_decoding: int
    to_vanilla: RatioWithInterval | None
    to_whole: RatioWithInterval | None
    ms: dict[str, float]


class CacheRun(TypedDict):
    """One policy in one precision; ``passes`` are all forwards of an answer, ``decoding`` those
    that denoise, and the ratios are of these."""

    precision: str
    policy: str
    commit: str  # "" where no block is committed apart
    looks: bool  # whether it is told who is in memory; then it has one memory
    items: int
    tally: JsonObject
    passes: float
    decoding: float
    to_vanilla: RatioWithInterval
    to_whole: RatioWithInterval | None
    kept: list[CacheOutcome]


class ExpertCacheRecord(TypedDict):
    experts: int
    k: int
    layers: int
    block: int
    main: str
    commits: bool
    precisions: list[PrecisionInfo]
    left_out: list[dict[str, str]]
    runs: list[CacheRun]


@dataclass(frozen=True)
class CachePoint:
    """One policy, one memory, one precision."""

    run: CacheRun
    outcome: CacheOutcome
    result: VariantResult
    vanilla: VariantResult  # of the same precision, on the same items
    bytes: float  # moved, of an answer

    @property
    def policy(self) -> str:
        return self.run["policy"]

    @property
    def hit_rate(self) -> float:
        return 1 - self.outcome["moved"] / self.outcome["used"] if self.outcome["used"] else 1.0

    @property
    def saved(self) -> RatioWithInterval | None:
        """Of vanilla's bytes, the share that was not moved, and its interval."""
        ratio = self.outcome["to_vanilla"]
        return None if ratio is None else [1 - ratio[0], 1 - ratio[2], 1 - ratio[1]]


@dataclass(frozen=True)
class ResultGrid:
    """The record, read back."""

    record: ExpertCacheRecord
    points: tuple[CachePoint, ...]

    @staticmethod
    def from_data(data: Mapping[str, object]) -> ResultGrid:
        record = cast("ExpertCacheRecord", data)
        return ResultGrid(record, tuple(_make_points(record)))

    def select(
        self, precision: str, share: str | None = None, commit: str = "policy"
    ) -> list[CachePoint]:
        """In the record's order, vanilla first; where no block is committed apart, all."""
        return [
            point
            for point in self.points
            if point.run["precision"] == precision
            and share in (None, point.outcome["share"])
            and point.run["commit"] in ("", commit)
        ]

    @property
    def baseline_precision(self) -> str:
        """The precision that others are held against."""
        return self.record["precisions"][0]["name"]

    def counterpart(self, point: CachePoint, precision: str) -> CachePoint | None:
        """The same run and memory in another precision."""
        for other in self.points:
            same_run = all(other.run[name] == point.run[name] for name in ("policy", "commit"))
            same_precision = other.run["precision"] == precision
            if same_run and same_precision and other.outcome["share"] == point.outcome["share"]:
                return other
        return None


def restrict_to(result: VariantResult, other: VariantResult) -> VariantResult:
    """Its first answers, as many of each task as the other has."""
    right = {task: bits[: len(other.right.get(task, ""))] for task, bits in result.right.items()}
    return replace(result, right={task: bits for task, bits in right.items() if bits})


def _make_points(record: ExpertCacheRecord) -> Iterator[CachePoint]:
    sizes = {entry["name"]: entry["expert_bytes"] for entry in record["precisions"]}
    vanilla_by_precision: dict[str, VariantResult] = {}
    for run in record["runs"]:
        result = VariantResult.from_json(run["tally"])
        vanilla = vanilla_by_precision.setdefault(run["precision"], result)
        for outcome in run["kept"]:
            size = outcome["moved"] * sizes[run["precision"]] / run["items"]
            yield CachePoint(run, outcome, result, restrict_to(vanilla, result), size)
