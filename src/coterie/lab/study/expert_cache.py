"""Experts that do not fit into memory: caching, election and low precision, alone and combined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.decoding.kv_schemes import parse_kv_scheme
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, TaskError
from coterie.keys import to_json
from coterie.lab.evals.expert_log import AnswerEntry, AnswerTraceLog
from coterie.lab.evals.generation import EvalRequest, generate_outcomes
from coterie.lab.evals.results import EvalResult, Variant
from coterie.lab.evals.run import grader_pool, make_answer
from coterie.lab.evals.stats import ratio_interval
from coterie.lab.evals.task import Task
from coterie.lab.replay.hardware_model import parse_bandwidth
from coterie.lab.study.experiment import BATCH_SIZE, Entry, StudyContext, interleave
from coterie.lab.study.results import VariantResult
from coterie.loading.load import Model, load_model
from coterie.model.moe import MoE
from coterie.model.weights import expert_bytes
from coterie.offload.eviction import Mask
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.routing import update_policy_text
from coterie.telemetry import Recorder, RowId
from coterie.values import ExpertStore, Routing, Scores, expert_mask

IntArray = NDArray[np.int64]

MEMORY_SHARES = {"100%": 1.0, "50%": 0.5, "35%": 0.35, "25%": 0.25, "12%": 0.12}
MAIN_SHARE = "35%"  # the share at which commits and policies with a resident bonus are compared
LINKS = ("25GB/s", "3GB/s")  # PCIe 4 x16, and a fast disk
SIXTEEN_BIT_NAMES: Mapping[torch.dtype, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOW_PRECISIONS = ("int8", "int4")
MEMORY_BLIND_POLICIES = (
    *("des-vote:beta=0.5", "des-vote:beta=0.3", "des-seq:k=3", "proportional-vote:beta=0.3"),
    *("priced-vote:price=0.022", "priced-vote:price=0.04"),
)
REUSE_POLICY = "priced-vote:price=0.022,resident_bonus=1,max_vote_loss=0.1"
REUSE_TOLERANCE = 0.05  # share of votes that a reused coreset may lose
RESIDENT_POLICIES = ("resident-vote:beta=0.3", REUSE_POLICY)
MAIN_RESIDENT_POLICIES = (
    *RESIDENT_POLICIES,
    "proportional-vote:beta=0.3,resident_bonus=3,max_vote_loss=0.2",
    "priced-vote:price=0.04,resident_bonus=1,max_vote_loss=0.1",
)
REDUCED_ITEMS_DIVISOR = 2  # policies with a resident bonus use fewer problems off the main runs


@dataclass(frozen=True)
class MeasuredRun:
    """One policy in one precision, with a simulated cache of every share of the experts."""

    request: ReplayRequest
    result: VariantResult
    passes: float  # all forwards of an answer, in the mean
    forwards: IntArray  # [n] denoising forwards of each answer
    caches: Mapping[str, CacheTransfers]

    @property
    def key(self) -> tuple[str, int | None]:
        """Equal for the same run in another precision."""
        return self.request.variant.name, self.request.slots


def measure_expert_cache(context: StudyContext) -> Entry:
    """Measure policies in every precision that loads, and simulate caches of every size."""
    spec, generation = context.engine.model.spec, context.engine.generation
    # A separate forward may write the keys of a finished block.
    commits = parse_kv_scheme(generation.kv_cache).base.writes_kv
    names, slots = precision_names(context.engine), slots_by_share(spec.router.experts)
    precisions: list[Entry] = []
    left_out: list[dict[str, str]] = []
    runs: list[Entry] = []
    whole: Mapping[tuple[str, int | None], MeasuredRun] = {}
    for index, name in enumerate(names):
        try:
            engine = engine_with_precision(context.engine, name)
        except CoterieError as error:
            left_out.append({"name": name, "why": str(error)})
            continue
        dtype = engine.model.transformer.dtype
        precisions.append(
            {
                "name": name,
                "dtype": str(dtype).removeprefix("torch."),  # of all weights but the experts
                "expert_bytes": expert_bytes(replace(engine.model.spec, panels=False), dtype),
            }
        )
        requests = run_requests(slots, context.num_problems, commits=commits, is_first=not runs)
        span = index / len(names), (index + 1) / len(names)
        measured = measure_runs(context, engine, name, requests, progress_span=span)
        del engine  # frees memory for the next precision
        size = precisions[-1]["expert_bytes"] / precisions[0]["expert_bytes"]
        for run in measured:
            others = {"to_vanilla": (measured[0], 1.0), "to_whole": (whole.get(run.key), size)}
            runs.append(run_record(run, others, precisions[-1]))
        whole = whole or {run.key: run for run in measured}
    if not runs:
        raise TaskError("; ".join(entry["why"] for entry in left_out))
    return {
        "experts": spec.router.experts,
        "k": spec.router.k,
        "layers": len(spec.moe_layers),
        "block": generation.block,
        "main": MAIN_SHARE,
        "commits": commits,
        "precisions": precisions,
        "left_out": left_out,
        "runs": runs,
    }


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
        expert_dtype=name if name in LOW_PRECISIONS else None,
    )
    return Engine(loaded, generation=engine.generation)


def slots_by_share(experts: int) -> dict[str, int]:
    """Slots of each layer's cache; shares below one expert are omitted."""
    slots = {share: int(part * experts + 1e-9) for share, part in MEMORY_SHARES.items()}
    return {share: number for share, number in slots.items() if number}


def run_requests(
    slots: Mapping[str, int], items: int, *, commits: bool, is_first: bool
) -> list[ReplayRequest]:
    """The runs of one precision, vanilla first; the first precision has both kinds of commits."""

    def make(
        policies: Sequence[str], options: Entry, slots: int | None = None, items: int = items
    ) -> list[ReplayRequest]:
        return [ReplayRequest(Variant(policy, options), items, slots) for policy in policies]

    by_policy: Entry = {"commit": "policy"} if commits else {}
    requests = [*make(["vanilla"], {}), *make(MEMORY_BLIND_POLICIES, by_policy)]
    for share, num_slots in slots.items():
        if is_first and share == MAIN_SHARE:
            requests += make(MAIN_RESIDENT_POLICIES, by_policy, num_slots)
            requests += make([REUSE_POLICY], {**by_policy, "drift": REUSE_TOLERANCE}, num_slots)
        else:
            reduced = -(-items // REDUCED_ITEMS_DIVISOR)
            requests += make(RESIDENT_POLICIES, by_policy, num_slots, reduced)
    if is_first and commits:
        requests += make(MEMORY_BLIND_POLICIES, {"commit": "vanilla"})
        if MAIN_SHARE in slots:
            requests += make(MAIN_RESIDENT_POLICIES, {"commit": "vanilla"}, slots[MAIN_SHARE])
    return requests


def measure_runs(
    context: StudyContext,
    engine: Engine,
    precision: str,
    requests: Sequence[ReplayRequest],
    *,
    progress_span: tuple[float, float],
) -> list[MeasuredRun]:
    """Generate the answers that the log files lack, and simulate the caches of every run."""
    folder = (context.answers or context.folder / "items") / "experts" / precision
    slots = slots_by_share(engine.model.spec.router.experts)
    first, last = progress_span
    total, done, runs = sum(request.items for request in requests), 0, []
    for request in requests:

        def on_progress(share: float, request: ReplayRequest = request, done: int = done) -> None:
            position = (done + share * request.items) / total
            activity = f"{precision}, {request.variant.name}"
            context.on_progress(first + (last - first) * position, activity)

        entries = answer_questions(engine, context.tasks, request, folder, on_progress)
        done += request.items
        eval_result = EvalResult(request.variant, tuple(entry.answer for entry in entries))
        runs.append(
            MeasuredRun(
                request,
                VariantResult.from_eval_result(eval_result),
                passes=sum(len(entry.kinds) for entry in entries) / len(entries),
                forwards=np.array([entry.answer.forwards for entry in entries]),
                caches={
                    share: simulate_cache(entries, num_slots)
                    for share, num_slots in slots.items()
                    if request.slots in (None, num_slots)
                },
            )
        )
    return runs


def run_record(
    run: MeasuredRun, others: Mapping[str, tuple[MeasuredRun | None, float]], precision: Entry
) -> Entry:
    """A run for the record, compared with ``others``: run and relative bytes of an expert by key.

    ``looks`` marks a policy that depends on the resident experts; it has one cache. ``commit`` is
    empty where blocks have no separate commit forward. A ratio is [value, low, high] of the 95 %
    interval, of denoising forwards in a run and of bytes in a cache. ``ms`` is the predicted time
    of an answer by link.
    """
    variant, items = run.request.variant, len(run.forwards)
    drift = variant.generation.get("drift")
    caches = []
    for share, cache in run.caches.items():
        moved = int(cache.loaded.sum())
        answer_bytes = moved * precision["expert_bytes"] / items
        ratios = {
            # Where all experts fit, each is loaded once at most.
            key: None
            if other is None or other is run or MEMORY_SHARES[share] == 1
            else ratio_with_interval(cache.loaded, other.caches[share].loaded, size)
            for key, (other, size) in others.items()
        }
        caches.append(
            {
                "share": share,
                "slots": cache.slots,
                "used": int(cache.used.sum()),
                "moved": moved,
                "moved_decoding": int(cache.loaded_decoding.sum()),
                **ratios,
                "ms": {link: 1e3 * answer_bytes / parse_bandwidth(link, "link") for link in LINKS},
            }
        )
    return {
        "precision": precision["name"],
        "policy": variant.policy if drift is None else f"{variant.policy} drift={drift}",
        "commit": variant.generation.get("commit", ""),
        "looks": run.request.slots is not None,
        "items": items,
        "tally": to_json(run.result),
        "passes": run.passes,
        "decoding": float(run.forwards.mean()),
        **{
            key: other and ratio_with_interval(run.forwards, other.forwards)
            for key, (other, _) in others.items()
        },
        "kept": caches,
    }


def ratio_with_interval(parts: IntArray, wholes: IntArray, scale: float = 1.0) -> list[float]:
    """The ratio of sums over the common answers, times ``scale``; paired bootstrap."""
    n = min(len(parts), len(wholes))
    parts_list, wholes_list = (x[:n].astype(float).tolist() for x in (parts, wholes))
    value = sum(parts_list) / max(sum(wholes_list), 1e-9)
    return [scale * end for end in (value, *ratio_interval(parts_list, wholes_list))]


@dataclass(frozen=True)
class ReplayRequest:
    """One run: a variant, the number of problems, and the slots of each layer's cache.

    ``slots`` is None for a policy that does not depend on the resident experts.
    """

    variant: Variant
    items: int
    slots: int | None = None

    @property
    def file(self) -> str:
        """Name of its log file."""
        slots = "" if self.slots is None else f" slots={self.slots}"
        return f"{self.variant.name}{slots}".replace("/", "+") + ".jsonl"


@dataclass(frozen=True)
class CacheTransfers:
    """Experts of each answer [n] that one cache served, loaded, and loaded for decoding."""

    slots: int
    used: IntArray
    loaded: IntArray
    loaded_decoding: IntArray


def simulate_cache(entries: Sequence[AnswerEntry], slots: int) -> CacheTransfers:
    """Serve the answers in sequence with an LRU cache of ``slots`` experts per layer.

    The cache is empty before the first answer and persists between answers.
    """
    layers, experts = entries[0].used.shape[1:]
    cache, counts = CacheSimulator(experts, slots), []
    for entry in entries:
        loads = entry.count_loads(cache, range(layers))
        decoding = [n for n, kind in zip(loads, entry.kinds, strict=True) if kind == "d"]
        counts.append((int(entry.used.sum()), sum(loads), sum(decoding)))
    return CacheTransfers(slots, *np.array(counts, dtype=np.int64).T)


def interleave_questions(tasks: Sequence[Task], items: int, engine: Engine) -> list[EvalRequest]:
    """The first ``items`` problems, alternating between tasks; fewer are a prefix of more."""
    by_task = [
        [EvalRequest(task, item, generation) for item in task.items()]
        for task in tasks
        for generation in [engine.generation.replace(**task.generation())]
    ]
    return interleave(by_task)[:items]


def answer_questions(
    engine: Engine,
    tasks: Sequence[Task],
    request: ReplayRequest,
    folder: Path,
    on_progress: Callable[[float], None],
) -> list[AnswerEntry]:
    """The entry of every problem, in order; entries in the log file are not generated again."""
    spec, name = engine.model.spec, request.file
    old_names = (p for p in sorted(folder.glob("*.jsonl")) if update_policy_text(p.name) == name)
    shape = len(spec.moe_layers), spec.router.experts
    questions = interleave_questions(tasks, request.items, engine)
    questions = [question.replace(request.variant.generation) for question in questions]
    with AnswerTraceLog.open(next(old_names, folder / name), shape) as log:
        while missing := [q for q in questions if (q.task.name, q.item.id) not in log.entries]:
            for entries in _generate_entries(engine, request, missing, log.entries.values()):
                log.add(entries)
                on_progress(len(log.entries) / len(questions))
                # The cache's state after a failure is unknown, so it is rebuilt from the log.
                if request.slots is not None and any(entry.answer.error for entry in entries):
                    break
        entries = [log.entries[question.task.name, question.item.id] for question in questions]
    if all(entry.answer.error for entry in entries):
        raise TaskError(f"{request.variant.name}: every item failed: {entries[0].answer.error}")
    return entries


def with_store(model: Model, store: ExpertStore) -> Model:
    """The same model with another expert store."""
    layers = tuple(
        replace(layer, feed_forward=replace(block, store=store))
        if isinstance(block := layer.feed_forward, MoE)
        else layer
        for layer in model.transformer.layers
    )
    return replace(model, transformer=replace(model.transformer, layers=layers))


def _generate_entries(
    engine: Engine,
    request: ReplayRequest,
    questions: Sequence[EvalRequest],
    answered: Iterable[AnswerEntry],
) -> Iterator[list[AnswerEntry]]:
    """Generate and grade, batch by batch.

    A policy that depends on the resident experts answers one problem at a time, with a simulated
    cache that has served the answers so far.
    """
    model, batch_size = engine.model, BATCH_SIZE
    spec, device = model.spec, model.transformer.device
    if request.slots is not None:
        cache = CacheSimulator(spec.router.experts, request.slots)
        store = SimulatedCacheStore(model.store, cache, device=device)
        for entry in answered:
            entry.count_loads(store.cache, spec.moe_layers)
        model, batch_size = with_store(model, store), 1

    def kind(row: int) -> str:
        next_pass = recording_engine.sequence(row).next_pass
        return "" if next_pass is None else next_pass.kind

    recorder = _ExpertUseRecorder(kind, (len(spec.moe_layers), spec.router.experts))
    recording_engine = Engine(
        model, generation=engine.generation, recorder=recorder, record_all=True
    )
    variant = request.variant
    with grader_pool() as graders:
        for outcomes in generate_outcomes(
            recording_engine, questions, variant.policy, batch_size=batch_size
        ):
            answers = graders.map(partial(make_answer, variant.name), outcomes)
            yield [
                AnswerEntry(answer, *recorder.pop(outcome.row))
                for outcome, answer in zip(outcomes, answers, strict=True)
            ]


@dataclass  # not frozen: it collects
class _ExpertUseRecorder(Recorder):
    """Records the experts of every forward of every row; ``kind`` returns a row's forward kind."""

    kind: Callable[[int], str]
    shape: tuple[int, int]  # MoE layers, experts
    _rows: tuple[int, ...] = ()
    _forwards: dict[int | None, list[tuple[str, list[Tensor]]]] = field(default_factory=dict)

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        self._rows = tuple(row for row in rows if isinstance(row, int))
        for row in self._rows:
            self._forwards.setdefault(row, []).append((self.kind(row), []))

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        masks = expert_mask(routing.topk_ids.view(len(self._rows), -1), scores.router.experts)
        for row, mask in zip(self._rows, masks, strict=True):
            self._forwards[row][-1][1].append(mask)

    def pop(self, row: int | None) -> tuple[str, Mask]:
        """Remove a row and return its forward kinds and experts in use [F, L, E].

        Incomplete forwards are omitted; ``row`` is None for an answer that was not generated.
        """
        forwards = [f for f in self._forwards.pop(row, []) if len(f[1]) == self.shape[0]]
        used = [torch.stack(masks).cpu().numpy() for _, masks in forwards]
        kinds = "".join(kind[0] for kind, _ in forwards)
        return kinds, np.array(used, dtype=bool).reshape(-1, *self.shape)
