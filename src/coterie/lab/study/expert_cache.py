"""Experts that do not fit into memory: caching, election and low precision, alone and combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch

from coterie.decoding.kv_schemes import parse_plan
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, TaskError
from coterie.keys import to_json
from coterie.lab.evals.run import Variant
from coterie.lab.evals.stats import ratio_interval
from coterie.lab.replay.hardware_model import HardwareModel, parse_bandwidth, predict_time
from coterie.lab.study.cache_simulation import (
    IntArray,
    ReplayRequest,
    answer_questions,
    simulate_cache,
    to_eval_result,
)
from coterie.lab.study.context import StudyContext
from coterie.lab.study.results import JsonObject, VariantResult
from coterie.loading.load import load_model
from coterie.model.weights import expert_bytes
from coterie.offload.capacity import Capacity

MEMORY_SHARES: tuple[str, ...] = ("100%", "50%", "35%", "25%", "12%")
MAIN_SHARE = "35%"  # the share at which commits and policies with a resident bonus are compared
LINKS = {"25GB/s": "PCIe 4 x16", "3GB/s": "a fast disk"}
SIXTEEN_BIT_NAMES: Mapping[torch.dtype, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOW_PRECISIONS = ("int8", "int4")
MEMORY_BLIND_POLICIES = (
    *("vanilla", "des-vote:beta=0.5", "des-vote:beta=0.3", "des-seq:k=3"),
    *("proportional-vote:beta=0.3", "priced-vote:price=0.022", "priced-vote:price=0.04"),
)
REUSE_POLICY = "priced-vote:price=0.022,resident_bonus=1,max_vote_loss=0.1"
REUSE_TOLERANCE = 0.05  # share of votes that a reused coreset may lose
RESIDENT_POLICIES = ("resident-vote:beta=0.3", REUSE_POLICY)
MAIN_RESIDENT_POLICIES = (
    "proportional-vote:beta=0.3,resident_bonus=3,max_vote_loss=0.2",
    "priced-vote:price=0.04,resident_bonus=1,max_vote_loss=0.1",
)
REDUCED_ITEMS_DIVISOR = 2  # policies with a resident bonus use fewer problems off the main runs

RatioWithInterval = list[float]  # value, and the ends of its 95 % interval


class PrecisionInfo(TypedDict):
    """``dtype`` is that of all weights but the experts."""

    name: str
    dtype: str
    expert_bytes: int


class CacheOutcome(TypedDict):
    """One cache of one run: experts used and moved in all forwards, and moved in decoding.

    ``to_vanilla`` and ``to_whole`` are the bytes relative to vanilla's and to the same run in 16
    bits, None where there is no such run or nothing moves. ``ms`` is the predicted time of an
    answer by link.
    """

    share: str
    slots: int
    used: int
    moved: int
    moved_decoding: int
    to_vanilla: RatioWithInterval | None
    to_whole: RatioWithInterval | None
    ms: dict[str, float]


class CacheRun(TypedDict):
    """One policy in one precision.

    ``passes`` are all forwards of an answer, ``decoding`` its denoising forwards, and the ratios
    compare these. ``looks``: the policy depends on the resident experts, so it has one cache.
    """

    precision: str
    policy: str
    commit: str  # empty where blocks have no separate commit forward
    looks: bool
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
    """One policy with one cache in one precision."""

    run: CacheRun
    outcome: CacheOutcome
    result: VariantResult
    vanilla: VariantResult  # in the same precision, on the same items
    bytes: float  # moved per answer

    @property
    def policy(self) -> str:
        return self.run["policy"]

    @property
    def share(self) -> str:
        return format_share(self.outcome["share"])

    @property
    def hit_rate(self) -> float:
        return 1 - self.outcome["moved"] / self.outcome["used"] if self.outcome["used"] else 1.0

    @property
    def saved(self) -> RatioWithInterval | None:
        """The share of vanilla's bytes that was not moved, with its interval."""
        ratio = self.outcome["to_vanilla"]
        return None if ratio is None else [1 - ratio[0], 1 - ratio[2], 1 - ratio[1]]


@dataclass(frozen=True)
class ResultGrid:
    """The points of a record, in its order."""

    record: ExpertCacheRecord
    points: tuple[CachePoint, ...]

    @staticmethod
    def from_record(record: ExpertCacheRecord) -> ResultGrid:
        sizes = {entry["name"]: entry["expert_bytes"] for entry in record["precisions"]}
        vanilla_by_precision: dict[str, VariantResult] = {}
        points = []
        for run in record["runs"]:
            result = VariantResult.from_json(run["tally"])
            vanilla = vanilla_by_precision.setdefault(run["precision"], result)
            for outcome in run["kept"]:
                moved_bytes = outcome["moved"] * sizes[run["precision"]] / run["items"]
                baseline = restrict_to(vanilla, result)
                points.append(CachePoint(run, outcome, result, baseline, moved_bytes))
        return ResultGrid(record, tuple(points))

    @property
    def baseline_precision(self) -> str:
        """The precision that lower ones are compared with."""
        return self.record["precisions"][0]["name"]

    @property
    def main(self) -> str:
        return format_share(self.record["main"])

    @property
    def commit_kinds(self) -> list[str]:
        return ["policy", "vanilla"] if self.record["commits"] else ["policy"]

    def select(
        self, precision: str, share: str | None = None, commit: str = "policy"
    ) -> list[CachePoint]:
        """The matching points, vanilla first; ``commit`` is ignored without commit forwards."""
        return [
            point
            for point in self.points
            if point.run["precision"] == precision
            and share in (None, point.outcome["share"])
            and point.run["commit"] in ("", commit)
        ]

    def main_points(self, commit: str = "policy") -> list[CachePoint]:
        return self.select(self.baseline_precision, self.record["main"], commit)

    def counterpart(self, point: CachePoint, precision: str) -> CachePoint | None:
        """The same run and cache in another precision."""
        for other in self.points:
            same_run = all(other.run[name] == point.run[name] for name in ("policy", "commit"))
            same_precision = other.run["precision"] == precision
            if same_run and same_precision and other.outcome["share"] == point.outcome["share"]:
                return other
        return None


def restrict_to(result: VariantResult, other: VariantResult) -> VariantResult:
    """The result on its first items, as many of each task as ``other`` has."""
    right = {task: bits[: len(other.right.get(task, ""))] for task, bits in result.right.items()}
    return replace(result, right={task: bits for task, bits in right.items() if bits})


def format_share(share: str) -> str:
    """ "35%" as in prose: "35 %"."""
    return share.replace("%", " %")


@dataclass(frozen=True)
class MeasuredRun:
    """One run: its result, and for each answer its denoising forwards and moved experts."""

    request: ReplayRequest
    result: VariantResult
    num_forwards: int
    decode_forwards: IntArray  # [n]
    moved_by_share: Mapping[str, IntArray]  # share -> experts [n]
    outcomes: Mapping[str, CacheOutcome]


def measure_expert_cache(context: StudyContext) -> ExpertCacheRecord:
    """Measure policies in every precision that loads, and simulate caches of every size."""
    spec, commits = context.engine.model.spec, has_separate_commits(context.engine)
    names = precision_names(context.engine)
    measured: list[tuple[PrecisionInfo, list[MeasuredRun]]] = []
    left_out: list[dict[str, str]] = []
    for index, name in enumerate(names):

        def on_progress(share: float, activity: str, index: int = index) -> None:
            context.on_progress((index + share) / len(names), activity)

        try:
            engine = engine_with_precision(context.engine, name)
        except CoterieError as error:
            left_out.append({"name": name, "why": str(error)})
            continue
        precision = precision_info(engine, name)
        requests = run_requests(engine, context, commits=commits, is_first=not measured)
        runs = measure_runs(context, engine, precision, requests, on_progress)
        measured.append((precision, runs))
        del engine  # frees memory for the next precision
    if not measured:
        raise TaskError("; ".join(entry["why"] for entry in left_out))
    return ExpertCacheRecord(
        experts=spec.router.experts,
        k=spec.router.k,
        layers=len(spec.moe_layers),
        block=context.engine.generation.block,
        main=MAIN_SHARE,
        commits=commits,
        precisions=[precision for precision, _ in measured],
        left_out=left_out,
        runs=[run for entry in measured for run in run_records(*entry, measured[0])],
    )


def precision_names(engine: Engine) -> list[str]:
    """16 bits, then lower precisions; the format alone where the checkpoint is quantised."""
    expert_format = engine.model.spec.expert_format
    base = SIXTEEN_BIT_NAMES.get(engine.model.transformer.dtype, "bf16")
    return [base, *LOW_PRECISIONS] if expert_format is None else [expert_format.name]


def engine_with_precision(engine: Engine, name: str) -> Engine:
    """The same model with its experts in this precision and all else in 16 bits.

    Raises CoterieError where it cannot be loaded, or does not fit next to the loaded model.
    """
    model = engine.model
    dtype, expert_format = model.transformer.dtype, model.spec.expert_format
    if name in (expert_format and expert_format.name, SIXTEEN_BIT_NAMES.get(dtype)):
        return engine
    loaded = load_model(
        model.folder,
        dtype=dtype if dtype in SIXTEEN_BIT_NAMES else torch.bfloat16,
        device=model.transformer.device,
        experts=name if name in LOW_PRECISIONS else None,
    )
    return Engine(loaded, generation=engine.generation)


def precision_info(engine: Engine, name: str) -> PrecisionInfo:
    spec, dtype = engine.model.spec, engine.model.transformer.dtype
    return PrecisionInfo(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        expert_bytes=expert_bytes(replace(spec, panels=False), dtype),
    )


def has_separate_commits(engine: Engine) -> bool:
    """Whether a separate forward writes the keys of a finished block."""
    return parse_plan(engine.generation.plan).scheme.traits.writes_kv


def slots_by_share(engine: Engine) -> dict[str, int]:
    """Slots of each layer's cache; shares below one expert are omitted."""
    experts = engine.model.spec.router.experts
    parsed = {share: Capacity.parse(share) for share in MEMORY_SHARES}
    return {
        share: capacity.slots(layers=1, experts=experts, expert_bytes=1)
        for share, capacity in parsed.items()
        if capacity.amount * experts >= 1
    }


def run_requests(
    engine: Engine, context: StudyContext, *, commits: bool, is_first: bool
) -> list[ReplayRequest]:
    """The runs of one precision, vanilla first; the first precision has both kinds of commits."""
    items, slots = context.num_problems, slots_by_share(engine)
    by_policy = {"commit": "policy"} if commits else {}
    requests = [
        ReplayRequest(Variant(policy, {} if policy == "vanilla" else by_policy), items)
        for policy in MEMORY_BLIND_POLICIES
    ]
    for share, num_slots in slots.items():
        is_main = is_first and share == MAIN_SHARE
        variants = [Variant(policy, by_policy) for policy in RESIDENT_POLICIES]
        if is_main:
            variants += [Variant(policy, by_policy) for policy in MAIN_RESIDENT_POLICIES]
            variants += [Variant(REUSE_POLICY, {**by_policy, "drift": REUSE_TOLERANCE})]
        num_items = items if is_main else -(-items // REDUCED_ITEMS_DIVISOR)
        requests += [ReplayRequest(variant, num_items, num_slots) for variant in variants]
    if is_first and commits:
        by_vanilla, main = {"commit": "vanilla"}, slots.get(MAIN_SHARE)
        blind = [policy for policy in MEMORY_BLIND_POLICIES if policy != "vanilla"]
        resident = (*RESIDENT_POLICIES, *MAIN_RESIDENT_POLICIES) if main is not None else ()
        requests += [ReplayRequest(Variant(policy, by_vanilla), items) for policy in blind]
        requests += [ReplayRequest(Variant(policy, by_vanilla), items, main) for policy in resident]
    return requests


def measure_runs(
    context: StudyContext,
    engine: Engine,
    precision: PrecisionInfo,
    requests: Sequence[ReplayRequest],
    on_progress: Callable[[float, str], None],
) -> list[MeasuredRun]:
    """Generate the answers that the log files lack, and simulate the caches of every run."""
    folder = (context.answers or context.folder / "items") / "experts" / precision["name"]
    by_share, total, done = slots_by_share(engine), sum(request.items for request in requests), 0
    runs = []
    for request in requests:

        def on_run_progress(
            share: float, request: ReplayRequest = request, done: int = done
        ) -> None:
            activity = f"{precision['name']}, {request.arm.name}"
            on_progress((done + share * request.items) / total, activity)

        entries = answer_questions(engine, context.tasks, request, folder, on_run_progress)
        done += request.items
        outcomes, moved_by_share = {}, {}
        for share, slots in by_share.items():
            if request.slots not in (None, slots):
                continue
            transfers = simulate_cache(entries, slots)
            moved_by_share[share] = transfers.sum_by_answer(transfers.loads, len(entries))
            times = {
                link: predict_time(
                    HardwareModel(parse_bandwidth(link, "link")), transfers.used, transfers.loads,
                    precision["expert_bytes"], decode_forwards=len(entries),
                )
                for link in LINKS
            }  # fmt: skip
            outcomes[share] = CacheOutcome(
                share=share,
                slots=slots,
                used=int(transfers.used.sum()),
                moved=int(transfers.loads.sum()),
                moved_decoding=int(transfers.loads[transfers.is_decode].sum()),
                to_vanilla=None,
                to_whole=None,
                ms={link: 1e3 * time.forward_seconds for link, time in times.items()},
            )
        runs.append(
            MeasuredRun(
                request=request,
                result=VariantResult.from_eval_result(to_eval_result(request, entries)),
                num_forwards=sum(len(entry.kinds) for entry in entries),
                decode_forwards=np.array([entry.answer.forwards for entry in entries]),
                moved_by_share=moved_by_share,
                outcomes=outcomes,
            )
        )
    return runs


def run_records(
    precision: PrecisionInfo,
    measured: Sequence[MeasuredRun],
    first: tuple[PrecisionInfo, Sequence[MeasuredRun]],
) -> Iterator[CacheRun]:
    """The runs for the record, compared with vanilla and with the first precision."""
    vanilla, first_runs = measured[0], first[1] if first[0] is not precision else []
    first_by_name = {(run.request.arm.name, run.request.slots): run for run in first_runs}
    size = precision["expert_bytes"] / first[0]["expert_bytes"]
    for run in measured:
        variant, forwards = run.request.arm, run.decode_forwards
        base = first_by_name.get((variant.name, run.request.slots))
        drift = variant.generation.get("drift")
        for share, outcome in run.outcomes.items():
            outcome["to_vanilla"] = _moved_ratio(run, vanilla, share)
            outcome["to_whole"] = _moved_ratio(run, base, share, size)
        yield CacheRun(
            precision=precision["name"],
            policy=variant.policy if drift is None else f"{variant.policy} drift={drift}",
            commit=str(variant.generation.get("commit", "")),
            looks=run.request.slots is not None,
            items=len(forwards),
            tally=to_json(run.result),
            passes=run.num_forwards / len(forwards),
            decoding=float(forwards.mean()),
            to_vanilla=ratio_with_interval(forwards, vanilla.decode_forwards),
            to_whole=None if base is None else ratio_with_interval(forwards, base.decode_forwards),
            kept=list(run.outcomes.values()),
        )


def ratio_with_interval(parts: IntArray, wholes: IntArray, scale: float = 1.0) -> RatioWithInterval:
    """The ratio of sums over the common answers, times ``scale``; paired bootstrap."""
    n = min(len(parts), len(wholes))
    parts_list, wholes_list = (x[:n].astype(float).tolist() for x in (parts, wholes))
    value = sum(parts_list) / max(sum(wholes_list), 1e-9)
    return [scale * end for end in (value, *ratio_interval(parts_list, wholes_list))]


def _moved_ratio(
    run: MeasuredRun, other: MeasuredRun | None, share: str, scale: float = 1.0
) -> RatioWithInterval | None:
    """None where all experts fit, because each is then loaded once at most."""
    if other is None or other is run or share == MEMORY_SHARES[0]:
        return None
    return ratio_with_interval(run.moved_by_share[share], other.moved_by_share[share], scale)
