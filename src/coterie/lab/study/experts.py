"""Experts that do not fit: a cache, an election and few bits, one by one and together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.decoding.kv_schemes import parse_plan
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.keys import to_json
from coterie.lab.evals.run import Variant
from coterie.lab.evals.stats import ratio_interval
from coterie.lab.replay.hardware_model import HardwareModel, parse_bandwidth, predict_time
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.experts_drawn import cache_drawings
from coterie.lab.study.experts_facts import (
    LINKS,
    MAIN_SHARE,
    MEMORY_SHARES,
    CacheOutcome,
    CacheRun,
    ExpertCacheRecord,
    PrecisionInfo,
    RatioWithInterval,
)
from coterie.lab.study.experts_told import cache_findings, cache_tables
from coterie.lab.study.results import JsonObject, VariantResult
from coterie.lab.study.simulated_cache import (
    ReplayRequest,
    answer_questions,
    simulate_cache,
    to_eval_result,
)
from coterie.loading.load import load_model
from coterie.model.weights import expert_bytes
from coterie.offload.capacity import Capacity

SIXTEEN_BIT_NAMES: Mapping[torch.dtype, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOW_PRECISIONS = ("int8", "int4")
MEMORY_BLIND_POLICIES = (
    *("vanilla", "des-vote:beta=0.5", "des-vote:beta=0.3", "des-seq:k=3"),
    *("proportional-vote:beta=0.3", "priced-vote:price=0.022", "priced-vote:price=0.04"),
)
RESIDENT_POLICIES = (
    "resident-vote:beta=0.3",
    "priced-vote:price=0.022,resident_bonus=1,max_vote_loss=0.1",
)
MAIN_RESIDENT_POLICIES = (
    "proportional-vote:beta=0.3,resident_bonus=3,max_vote_loss=0.2",
    "priced-vote:price=0.04,resident_bonus=1,max_vote_loss=0.1",
)
REUSE_POLICY, REUSE_TOLERANCE = (
    RESIDENT_POLICIES[1],
    0.05,
)  # a block's coresets kept while they lose no more votes
REDUCED_ITEMS_DIVISOR = (
    2  # where residents are preferred, other runs than the main ones ask one in so many
)

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class MeasuredRun:
    """One run as it was measured: per answer, what its memories brought and its forwards."""

    request: ReplayRequest
    result: VariantResult
    num_forwards: int
    decode_forwards: IntArray  # [n]
    moved_by_share: Mapping[str, IntArray]  # share -> experts [n]
    outcomes: Mapping[str, CacheOutcome]


@dataclass(frozen=True)
class ExpertCacheExperiment:
    """Policy x share of the experts in memory x precision: accuracy, hits, bytes, forwards."""

    name: str = "experts"
    title: str = "Experts that do not fit: caching, election and few bits"
    question: str = (
        "Where only some of the experts are in fast memory, can a cache cut what is moved and keep "
        "answers and forwards, and what do experts in few bits add, at what cost?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        model, commits = context.engine.model, has_separate_commits(context.engine)
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
            measured.append(
                (precision, measure_runs(context, engine, precision, requests, on_progress))
            )
            del engine  # the next one may need its room
        if not measured:
            raise CoterieError("; ".join(entry["why"] for entry in left_out))
        record = ExpertCacheRecord(
            experts=model.spec.router.experts,
            k=model.spec.router.k,
            layers=len(model.spec.moe_layers),
            block=context.engine.generation.block,
            main=MAIN_SHARE,
            commits=commits,
            precisions=[precision for precision, _ in measured],
            left_out=left_out,
            runs=[run for entry in measured for run in run_records(*entry, measured[0])],
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        return cache_drawings(data)

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        return cache_tables(data)

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        return cache_findings(data)


def precision_names(engine: Engine) -> list[str]:
    """16 bits, then fewer; of experts that came in few bits, only these."""
    expert_format = engine.model.spec.expert_format
    base = SIXTEEN_BIT_NAMES.get(engine.model.transformer.dtype, "bf16")
    return [base, *LOW_PRECISIONS] if expert_format is None else [expert_format.name]


def engine_with_precision(engine: Engine, name: str) -> Engine:
    """The same model with its experts so, everything else in 16 bits; raises CoterieError where it
    cannot be made, or there is no room beside the one that is loaded."""
    model = engine.model
    dtype = model.transformer.dtype
    expert_format = model.spec.expert_format
    if (expert_format is not None and expert_format.name == name) or SIXTEEN_BIT_NAMES.get(
        dtype
    ) == name:
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
    """Whether a finished block's keys are written in a forward of their own."""
    return parse_plan(engine.generation.plan).scheme.traits.writes_kv


def slots_by_share(engine: Engine) -> dict[str, int]:
    """Of each layer; shares that are less than one expert are left out."""
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
    """Vanilla first. In the first precision (``whole``) every rule with both kinds of commits."""
    slots, reduced_items = slots_by_share(engine), -(-context.num_problems // REDUCED_ITEMS_DIVISOR)
    default_commit = {"commit": "policy"} if commits else {}
    requests = [
        ReplayRequest(
            Variant(rule, {} if rule == "vanilla" else default_commit), context.num_problems
        )
        for rule in MEMORY_BLIND_POLICIES
    ]
    for share, num_slots in slots.items():
        is_main = is_first and share == MAIN_SHARE
        rules = (*RESIDENT_POLICIES, *(MAIN_RESIDENT_POLICIES if is_main else ()))
        num_items = context.num_problems if is_main else reduced_items
        requests += [
            ReplayRequest(Variant(rule, default_commit), num_items, num_slots) for rule in rules
        ]
        requests += (
            [
                ReplayRequest(
                    Variant(REUSE_POLICY, {**default_commit, "drift": REUSE_TOLERANCE}),
                    num_items,
                    num_slots,
                )
            ]
            if is_main
            else []
        )
    if is_first and commits:
        vanilla_commit = {"commit": "vanilla"}
        requests += [
            ReplayRequest(Variant(rule, vanilla_commit), context.num_problems)
            for rule in MEMORY_BLIND_POLICIES
            if rule != "vanilla"
        ]
        rules = (*RESIDENT_POLICIES, *MAIN_RESIDENT_POLICIES)
        requests += [
            ReplayRequest(Variant(rule, vanilla_commit), context.num_problems, slots[MAIN_SHARE])
            for rule in rules
            if MAIN_SHARE in slots
        ]
    return requests


def measure_runs(
    context: StudyContext,
    engine: Engine,
    precision: PrecisionInfo,
    requests: Sequence[ReplayRequest],
    on_progress: Callable[[float, str], None],
) -> list[MeasuredRun]:
    """Every run, answered where its logbook does not have it yet, and what memories brought."""
    folder = (context.answers or context.folder / "items") / "experts" / precision["name"]
    by_share, total, done = slots_by_share(engine), sum(request.items for request in requests), 0
    runs = []
    for request in requests:

        def on_run_progress(
            share: float, request: ReplayRequest = request, done_before: int = done
        ) -> None:
            on_progress(
                (done_before + share * request.items) / total,
                f"{precision['name']}, {request.arm.name}",
            )

        entries = answer_questions(engine, context.tasks, request, folder, on_run_progress)
        done += request.items
        shares = {s: n for s, n in by_share.items() if request.slots in (None, n)}
        outcomes, moved_by_share = {}, {}
        for share, slots in shares.items():
            transfers = simulate_cache(entries, slots)
            moved_by_share[share] = transfers.sum_by_answer(transfers.loads, len(entries))
            outcomes[share] = CacheOutcome(
                share=share,
                slots=slots,
                used=int(transfers.used.sum()),
                moved=int(transfers.loads.sum()),
                moved_decoding=int(transfers.loads[transfers.is_decode].sum()),
                to_vanilla=None,
                to_whole=None,
                ms={
                    link: 1e3 * predict_time(
                        HardwareModel(parse_bandwidth(link, "link")), transfers.used, transfers.loads,
                        precision["expert_bytes"], decode_forwards=len(entries),
                    ).forward_seconds
                    for link in LINKS
                },
            )  # fmt: skip
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
    counted: Sequence[MeasuredRun],
    first: tuple[PrecisionInfo, Sequence[MeasuredRun]],
) -> Iterator[CacheRun]:
    """As the record has them, held against vanilla and against the first precision."""
    vanilla, first_runs = counted[0], first[1] if first[0] is not precision else []
    first_by_name = {(run.request.arm.name, run.request.slots): run for run in first_runs}
    size = precision["expert_bytes"] / first[0]["expert_bytes"]
    for run in counted:
        first_run = first_by_name.get((run.request.arm.name, run.request.slots))
        yield CacheRun(
            precision=precision["name"],
            policy=policy_label(run.request.arm),
            commit=str(run.request.arm.generation.get("commit", "")),
            looks=run.request.slots is not None,
            items=len(run.decode_forwards),
            tally=result_fields(run.result),
            passes=run.num_forwards / len(run.decode_forwards),
            decoding=float(run.decode_forwards.mean()),
            to_vanilla=ratio_with_interval(run.decode_forwards, vanilla.decode_forwards),
            to_whole=None if first_run is None else ratio_with_interval(run.decode_forwards, first_run.decode_forwards),
            kept=[
                CacheOutcome(**{**outcome, "to_vanilla": _moved_ratio(run, vanilla, share),
                        "to_whole": _moved_ratio(run, first_run, share, size)})
                for share, outcome in run.outcomes.items()
            ],
        )  # fmt: skip


def policy_label(variant: Variant) -> str:
    """As tables call it: without who routes commits."""
    drift = variant.generation.get("drift")
    return variant.policy if drift is None else f"{variant.policy} --drift {drift}"


def result_fields(result: VariantResult) -> JsonObject:
    """Without what follows from the rest."""
    return to_json(result)


def ratio_with_interval(parts: IntArray, wholes: IntArray, scale: float = 1.0) -> RatioWithInterval:
    """Of the sums over the answers that both have, times ``scale``; paired bootstrap."""
    n = min(len(parts), len(wholes))
    parts_list, wholes_list = (x[:n].astype(float).tolist() for x in (parts, wholes))
    value = sum(parts_list) / max(sum(wholes_list), 1e-9)
    return [scale * end for end in (value, *ratio_interval(parts_list, wholes_list))]


def _moved_ratio(
    run: MeasuredRun, other_run: MeasuredRun | None, share: str, scale: float = 1.0
) -> RatioWithInterval | None:
    """None where everybody stays in memory: then nothing moves but once."""
    if other_run is None or other_run is run or share == MEMORY_SHARES[0]:
        return None
    return ratio_with_interval(run.moved_by_share[share], other_run.moved_by_share[share], scale)
