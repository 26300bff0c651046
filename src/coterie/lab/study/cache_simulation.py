"""Answers and the experts of each of their forwards, and simulated caches that serve them.

The experts of every forward determine the loads of a cache of any size, and the state of a cache
in which an interrupted run continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.errors import TaskError
from coterie.lab.evals.expert_log import AnswerEntry, AnswerTraceLog
from coterie.lab.evals.generation import EvalRequest, generate_outcomes
from coterie.lab.evals.results import Variant
from coterie.lab.evals.run import MAX_GRADERS, make_answer
from coterie.lab.evals.task import Task
from coterie.lab.study.context import BATCH_SIZE, interleave
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.offload.eviction import Mask
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.routing import update_policy_text
from coterie.telemetry import Recorder, RowId
from coterie.values import ExpertStore, Routing, Scores, expert_mask

IntArray = NDArray[np.int64]


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
    with ThreadPoolExecutor(MAX_GRADERS) as graders:
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
