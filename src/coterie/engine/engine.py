"""The engine: requests come in as rows, rows share forwards, events come out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from coterie.decoding import BlockUpdate, DecodeRequest, SequenceState
from coterie.decoding.canvas import Block
from coterie.decoding.kv_schemes import PassKind
from coterie.engine.batch import NULL_RECORDER, ActiveSequence, group_sequences, run_forward
from coterie.engine.cuda_graphs import CudaGraphs
from coterie.engine.events import Denoised, Event, ExpertUsage, Finished, Result
from coterie.engine.generation_config import GenerationConfig, make_request
from coterie.engine.kv_pool import KVCachePool
from coterie.errors import CoterieError, NonFiniteLogitsError
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.load import Model, load_model
from coterie.model.weights import expert_bytes
from coterie.offload.traffic import Traffic
from coterie.routing import POLICIES, check_coreset_reuse, check_layers, format_policy, parse_policy
from coterie.telemetry import ExpertCounter, Recorder
from coterie.values import Policy

Prompt = str | Sequence[int]


class Engine:
    """One model, any number of rows at once.

    ``generation`` and ``policy`` are what a request gets where it asks for nothing else. A
    ``watcher`` is shown every decoding forward, or ``every`` forward. With ``graphs``, a GPU keeps
    the forwards that nobody watches and plays them again. Not safe to call from several threads.
    """

    def __init__(
        self,
        model: Model,
        *,
        policy: str | Policy = "vanilla",
        generation: GenerationConfig | None = None,
        recorder: Recorder = NULL_RECORDER,
        graphs: bool = True,
        record_all: bool = False,
    ) -> None:
        self.model = model
        self.policy = _policy(policy)
        self.generation = generation or GenerationConfig.for_family(model.family.defaults)
        self._kv_pool = KVCachePool(model.spec, model.transformer.dtype, model.transformer.device)
        on_gpu = model.transformer.device.type == "cuda"
        self._graphs = CudaGraphs(model.transformer) if graphs and on_gpu else None
        self._counter = ExpertCounter()
        self._recorder, self._record_all = recorder, record_all
        self._active: dict[int, ActiveSequence] = {}
        self._queues: dict[int, deque[Event]] = {}
        self._events: list[Event] = []
        self._next_number = 0

    def generate(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: object
    ) -> Result:
        """The finished text of one prompt: ``stream``, exhausted."""
        *_, final = self.stream(prompt, policy=policy, **options)
        if not isinstance(final, Finished):
            raise RuntimeError("a stream ended without a result")
        return final.result

    def stream(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: object
    ) -> Iterator[Event]:
        """Events of one prompt, the last one ``Finished``. Closing the iterator frees the row."""
        number = self.submit(prompt, policy=policy, **options)
        events = self._event_stream(number)
        next(events)  # a generator that has begun frees its row however it ends
        return events

    def submit(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: object
    ) -> int:
        """Add a row; ``step`` works on it. ``options`` are the fields of ``Generation``."""
        generation = self.generation.replace(**options)
        resolved_policy = self.policy if policy is None else _policy(policy)
        check_layers(resolved_policy, len(self.model.spec.moe_layers))
        if generation.reuse_tolerance is not None:
            check_coreset_reuse(resolved_policy)
        sequence = SequenceState(self._request(prompt, generation))
        cache_row = self._kv_pool.allocate(sequence.canvas.length)
        active = ActiveSequence(
            self._next_number,
            sequence,
            cache_row,
            resolved_policy,
            generation,
            traffic_before=self.traffic(),
        )
        if sequence.request.unmask.smooth is not None:
            tokens = sequence.canvas.tokens[None].to(self.model.transformer.device)
            active.embeddings = self.model.transformer.embed(tokens)[0].clone()
        self._active[active.number] = active
        self._next_number += 1
        return active.number

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward for every row; rows of one width and policy share it.

        Returns the events of rows that no ``stream`` reads. Raises Stuck, once all rows have had
        their turn, if the logits of some are not finite: rows that shared a forward with these stay
        as they were, and events of the others are kept.
        """
        reason, failed = "", []
        for group in group_sequences(self._active.values()):
            try:
                self._advance(group)
            except CoterieError as error:
                reason, failed = reason or str(error), failed + [active.number for active in group]
        if failed:
            raise NonFiniteLogitsError(reason, tuple(failed))
        events, self._events = self._events, []
        return events

    def _advance(self, group: list[ActiveSequence]) -> None:
        passes = [(active, active.next_pass, active.sequence.block) for active in group]
        with self._logged_forward(group):
            updates = run_forward(
                self.model.transformer,
                self._kv_pool,
                group,
                self._counter,
                self._recorder,
                graphs=self._graphs,
                record_all=self._record_all,
            )
        for (active, next_pass, block), update in zip(passes, updates, strict=True):
            if next_pass.is_denoising:
                self._emit(self._denoised(active, next_pass.kind, block, update))
            if active.sequence.next_pass is None:
                self._emit(Finished(active.number, self.result(active.number)))
                self.cancel(active.number)

    @contextmanager
    def _logged_forward(self, group: Sequence[ActiveSequence]) -> Iterator[None]:
        """A forward in the ledger of a memory that does not hold all experts."""
        if (log := self.model.store.traffic_log) is None:
            yield
            return
        rows, blocks = (
            (active.number for active in group),
            (active.sequence.block.index for active in group),
        )
        log.begin_forward(group[0].next_pass.kind, tuple(rows), tuple(blocks))
        try:
            yield
        finally:
            log.end_forward()

    def cancel(self, number: int) -> None:
        """Forget a row, finished or not."""
        active = self._active_sequence(number)
        del self._active[number]
        self._kv_pool.free(active.cache_row)
        self._counter.drop_row(number)

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows still being worked on."""
        return tuple(self._active)

    def sequence(self, number: int) -> SequenceState:
        """The row itself: its canvas, its block, the forward it waits for."""
        return self._active_sequence(number).sequence

    def result(self, number: int) -> Result:
        """What a row has come to so far."""
        active, model = self._active_sequence(number), self.model
        sequence, counts = active.sequence, self._counter.counts(number)
        answer = sequence.answer
        size = expert_bytes(model.spec, model.transformer.dtype)
        return Result(
            text=model.codec.decode(answer),
            tokens=tuple(answer),
            finish_reason="stop" if sequence.ended_by_eos else "length",
            prompt_tokens=len(sequence.request.prompt_ids),
            new_tokens=len(answer),
            forwards=sequence.steps.total,
            prefills=active.prefills,
            commits=active.commits,
            blocks=sequence.block.index + 1,
            seconds=time.perf_counter() - active.start_time,
            policy=_policy_name(active.policy),
            plan=str(sequence.request.plan),
            unmask=str(sequence.request.unmask),
            model=model.name,
            dtype=str(model.transformer.dtype).removeprefix("torch."),
            device=str(model.transformer.device),
            experts=ExpertUsage(
                total=model.spec.router.experts,
                forwards=counts.forwards,
                max=counts.max,
                mean=counts.mean,
                per_layer=counts.per_layer,
            ),
            expert_bytes=counts.mean * size,
            expert_bytes_vanilla=counts.vanilla_mean * size,
            vote_mass_kept=counts.vote_mass_kept,
            coreset_reuse_rate=counts.coreset_reuse_rate,
            reuse_vote_loss=counts.reuse_vote_loss,
            traffic=self.traffic(active.traffic_before),
        )

    def traffic(self, earlier: Traffic | None = None) -> Traffic | None:
        """What all rows' forwards moved, ``since`` an earlier reading or ever; None where all
        experts are in memory."""
        if (log := self.model.store.traffic_log) is None:
            return None
        current = log.traffic()
        return current if earlier is None else current - earlier

    def reset_cache(self) -> None:
        """Let the experts' memory be as it was at first, so that what comes depends on nothing
        before. Raises RuntimeError while a row is on its way."""
        if self._active:
            raise RuntimeError("a row on its way may need what is in memory")
        self.model.store.reset()

    def _active_sequence(self, number: int) -> ActiveSequence:
        if number not in self._active:
            raise CoterieError(f"there is no row {number}")
        return self._active[number]

    def _request(self, prompt: Prompt, generation: GenerationConfig) -> DecodeRequest:
        ids = self.model.codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return make_request(
            ids,
            generation,
            mask_id=self.model.mask_id,
            stop_ids=self.model.eos_ids,
            vocabulary=self.model.spec.vocabulary,
            max_length=self.model.spec.max_length,
        )

    def _event_stream(self, number: int) -> Iterator[Event]:
        queue = self._queues[number] = deque[Event]()
        try:
            yield Denoised(number)
            while queue or number in self._active:
                if queue:
                    yield queue.popleft()
                else:
                    self._events += self.step()
        finally:
            del self._queues[number]
            if number in self._active:
                self.cancel(number)

    def _emit(self, event: Event) -> None:
        self._queues.get(event.row, self._events).append(event)

    def _denoised(
        self, active: ActiveSequence, kind: PassKind, block: Block, update: BlockUpdate
    ) -> Denoised:
        prompt = active.sequence.canvas.prompt_length
        counts = self._counter.latest_counts(active.number) if kind == "decode" else None
        return Denoised(
            row=active.number,
            forward=active.sequence.steps.total,
            kind=kind,
            block=block.index,
            start=block.start - prompt,
            stop=block.stop - prompt,
            committed=update.committed,
            edited=update.edited,
            provisional=update.provisional,
            experts=() if counts is None else tuple(map(int, counts.per_layer)),
            vote_mass_kept=None if counts is None else counts.vote_mass_kept,
            reuse_vote_loss=None if counts is None else counts.reuse_vote_loss,
        )


def load(
    name_or_path: str | Path | None = None,
    *,
    policy: str | Policy = "vanilla",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    experts: str | None = None,
    expert_memory: str | ExpertMemoryConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    graphs: bool = True,
    **options: object,
) -> Engine:
    """An engine over a folder, a hub id, or (None) the embedded model; see ``load_model``.

    ``graphs``: a GPU keeps decoding forwards and plays them again (on a CPU this says nothing).
    ``options`` are fields of ``Generation``: what a request gets where it asks for nothing else.
    """
    resolved_policy = _policy(policy)
    model = load_model(
        name_or_path,
        dtype=dtype,
        device=device,
        experts=experts,
        expert_memory=expert_memory,
        on_progress=on_progress,
    )
    default = GenerationConfig.for_family(model.family.defaults)
    return Engine(
        model, policy=resolved_policy, generation=default.replace(**options), graphs=graphs
    )


def _policy(policy: str | Policy) -> Policy:
    return parse_policy(policy) if isinstance(policy, str) else policy


def _policy_name(policy: Policy) -> str:
    """Its spelling; a policy of the caller's own, outside the table, tells of itself."""
    return format_policy(policy) if type(policy) in POLICIES.values() else repr(policy)
