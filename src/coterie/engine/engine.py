"""The engine: submits requests, runs forwards that they share, and emits events."""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, overload

import torch

from coterie.decoding import BlockUpdate, DecodeRequest, SequenceState
from coterie.decoding.canvas import Block
from coterie.decoding.kv_schemes import PassKind
from coterie.engine.active_sequence import ActiveSequence, group_sequences, key_policy
from coterie.engine.cuda_graphs import CudaGraphs
from coterie.engine.events import Denoised, Event, ExpertUsage, Finished, Result
from coterie.engine.forward import run_forward
from coterie.engine.generation_config import GenerationConfig, make_request
from coterie.engine.kv_pool import KVCachePool
from coterie.engine.prefix_cache import PrefixCacheStats
from coterie.engine.prompt_prefixes import PromptPrefixes
from coterie.errors import (
    AnswerTextError,
    ConfigError,
    CoterieError,
    GenerationError,
    NonFiniteLogitsError,
    TokenizerError,
)
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.load import Model, load_model
from coterie.model.weights import expert_bytes
from coterie.offload.traffic import Traffic
from coterie.routing import (
    POLICIES,
    check_coreset_reuse,
    check_layers,
    format_policy,
    needs_importance,
    parse_policy,
)
from coterie.telemetry import ExpertCounter, Recorder
from coterie.values import Policy

Prompt = str | Sequence[int]
DEFAULT_BATCH_SIZE = 16  # prompts of one ``generate`` in progress together


class Engine:
    """One model that decodes any number of requests at once. Not thread-safe.

    ``policy`` and ``generation`` are the defaults of each request. ``recorder`` sees every decode
    forward, or with ``record_all`` every forward. ``graphs`` replays unrecorded decode forwards as
    CUDA graphs on a GPU. ``prefill_chunk`` and ``prefix_cache_bytes`` are ``chunk`` and
    ``cache_bytes`` of ``PromptPrefixes``.
    """

    def __init__(
        self,
        model: Model,
        *,
        policy: str | Policy = "vanilla",
        generation: GenerationConfig | None = None,
        recorder: Recorder | None = None,
        graphs: bool = True,
        record_all: bool = False,
        prefill_chunk: int | None = None,
        prefix_cache_bytes: int = 0,
    ) -> None:
        self.model = model
        self.policy = _policy(policy)
        self.generation = generation or GenerationConfig.for_family(model.defaults)
        self._kv_pool = KVCachePool(model.spec, model.transformer.dtype, model.transformer.device)
        on_gpu = model.transformer.device.type == "cuda"
        self._graphs = CudaGraphs(model.transformer) if graphs and on_gpu else None
        self._prefixes = PromptPrefixes(model.spec.router, prefill_chunk, prefix_cache_bytes)
        self._counter = ExpertCounter()
        self._recorder, self._record_all = recorder, record_all
        self._active: dict[int, ActiveSequence] = {}
        self._queues: dict[int, deque[Event]] = {}
        self._events: list[Event] = []
        self._next_number = 0

    @overload
    def generate(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: Any
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        *,
        policy: str | Policy | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        **options: Any,
    ) -> list[Result]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        policy: str | Policy | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        **options: Any,
    ) -> Result | list[Result]:
        """Decode one prompt, or a list of them with ``batch_size`` in progress, to the end.

        A prompt is text or token ids. ``options`` are fields of ``GenerationConfig``. Results are
        in the order of the prompts. After an error no request of the call is active.
        """
        if batch_size < 1:
            raise ConfigError(f"`batch_size` must be at least 1, not {batch_size}")
        if _is_one_prompt(prompt):
            return self._run([cast(Prompt, prompt)], policy, 1, options)[0]
        return self._run(cast("list[Prompt]", list(prompt)), policy, batch_size, options)

    def _run(
        self,
        prompts: Sequence[Prompt],
        policy: str | Policy | None,
        batch_size: int,
        options: Mapping[str, Any],
    ) -> list[Result]:
        waiting, results = deque(enumerate(prompts)), dict[int, Result]()
        indices: dict[int, int] = {}  # of the prompt, by request
        self._kv_pool.reserve(min(batch_size, len(prompts)))
        try:
            while len(results) < len(prompts):
                while waiting and len(indices) - len(results) < batch_size:
                    index, prompt = waiting.popleft()
                    indices[self.submit(prompt, policy=policy, **options)] = index
                events = self.step()
                self._events += [event for event in events if event.row not in indices]
                finished = (event for event in events if isinstance(event, Finished))
                results |= {indices[e.row]: e.result for e in finished if e.row in indices}
        finally:
            for number in indices.keys() & self._active.keys():
                self.cancel(number)
            self._events = [event for event in self._events if event.row not in indices]
            self._kv_pool.reserve(1)
        return [results[index] for index in range(len(prompts))]

    def stream(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: object
    ) -> Iterator[Event]:
        """The events of one prompt, up to ``Finished``. Closing the iterator cancels it."""
        number = self.submit(prompt, policy=policy, **options)
        events = self._event_stream(number)
        # Only a generator that has started runs its ``finally``, which cancels the request.
        next(events)
        return events

    def submit(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: object
    ) -> int:
        """Add a request for ``step`` to work on, and return its number.

        ``options`` are fields of ``GenerationConfig``. Raises GenerationError for an invalid
        prompt, and ConfigError for an invalid option.
        """
        generation = self.generation.replace(**options)
        resolved_policy = self.policy if policy is None else _policy(policy)
        check_layers(resolved_policy, len(self.model.spec.moe_layers))
        if generation.reuse_tolerance is not None:
            check_coreset_reuse(resolved_policy)
        request = self._request(prompt, generation)
        _check_joined_commits(request, generation, resolved_policy)
        prefix = self._prefixes.find(request, key_policy("prefill", resolved_policy, generation))
        sequence = SequenceState(replace(request, prefill=prefix.prefill))
        cache_row = self._kv_pool.allocate(sequence.canvas.length, prefix.blocks)
        active = ActiveSequence(
            self._next_number,
            sequence,
            cache_row,
            resolved_policy,
            generation,
            exact_keys=prefix.prefill.start,
            shared_keys=prefix.prefill.start,
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
        """Run one forward for every request; requests with equal shapes and policy share it.

        Returns the events of requests that no ``stream`` reads. A failed group does not stop the
        others: the error is raised after all groups have run, and the next call returns their
        events. The requests of a failed group have not advanced. Raises NonFiniteLogitsError with
        the requests that got logits that are not finite, and AnswerTextError for requests with
        text that cannot be decoded, which end. Every other error is raised as it is.
        """
        errors: list[Exception] = []
        reasons: dict[int, str] = {}  # of requests with non-finite logits
        without_text: dict[int, str] = {}
        mixes = self._mixes_commits()
        groups = deque(group_sequences(self._active.values(), mix_commits=mixes))
        while groups:
            group = groups.popleft()
            try:
                without_text |= self._advance(group)
            except NonFiniteLogitsError as error:
                # Each request runs again alone, so that only those that are the cause fail.
                groups.extend([active] for active in group if len(group) > 1)
                reasons |= {group[0].number: str(error)} if len(group) == 1 else {}
            except (CoterieError, OSError) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        if without_text:
            raise AnswerTextError(next(iter(without_text.values())), tuple(without_text))
        if reasons:
            raise NonFiniteLogitsError(next(iter(reasons.values())), tuple(reasons))
        events, self._events = self._events, []
        return events

    def _mixes_commits(self) -> bool:
        """Whether commits and decodes may share forwards.

        Graphs have fixed shapes. A recorder and a traffic log count the kinds apart.
        """
        is_recorded = self._recorder is not None or self.model.store.traffic_log is not None
        return self._graphs is None and not is_recorded

    def _advance(self, group: list[ActiveSequence]) -> dict[int, str]:
        """Run one forward; returns why the text of a request that ends here cannot be decoded."""
        passes = [(active, active.next_pass, active.sequence.block) for active in group]
        policy = group[0].next_policy()
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
        reasons: dict[int, str] = {}
        for (active, next_pass, block), update in zip(passes, updates, strict=True):
            self._prefixes.after_pass(active, next_pass, policy, self._kv_pool)
            try:
                if next_pass.is_denoising:
                    self._emit(self._denoised(active, next_pass.kind, block, update))
                if active.sequence.next_pass is None:
                    self._emit(Finished(active.number, self.result(active.number)))
                    self.cancel(active.number)
            except TokenizerError as error:
                reasons[active.number] = str(error)
                self.cancel(active.number)
        return reasons

    @contextmanager
    def _logged_forward(self, group: Sequence[ActiveSequence]) -> Iterator[None]:
        """Mark the start and the end of a forward in the store's traffic log, if there is one."""
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
        """Remove a request, finished or not. Raises GenerationError for an unknown number."""
        active = self._active_sequence(number)
        del self._active[number]
        self._kv_pool.free(active.cache_row)
        self._counter.drop_row(number)

    @property
    def rows(self) -> tuple[int, ...]:
        """The numbers of the active requests."""
        return tuple(self._active)

    def sequence(self, number: int) -> SequenceState:
        """The decoding state of an active request: its canvas, its block, its next forward."""
        return self._active_sequence(number).sequence

    def result(self, number: int) -> Result:
        """The result of an active request so far."""
        active, model = self._active_sequence(number), self.model
        sequence, counts = active.sequence, self._counter.counts(number)
        answer = sequence.answer
        size = expert_bytes(model.spec, model.transformer.dtype)
        return Result(
            text=model.tokenizer.decode(answer),
            tokens=tuple(answer),
            finish_reason="stop" if sequence.ended_by_eos else "length",
            prompt_tokens=len(sequence.request.prompt_ids),
            new_tokens=len(answer),
            forwards=sequence.steps.total,
            prefills=active.prefills,
            commits=active.commits,
            blocks=sequence.block.index + 1,
            computed_positions=active.computed_positions,
            skip_settled=sequence.request.skip_settled,
            seconds=time.perf_counter() - active.start_time,
            policy=_policy_name(active.policy),
            kv_cache=str(sequence.request.kv_scheme),
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
            cached_tokens=sequence.request.prefill.start,
        )

    def traffic(self, earlier: Traffic | None = None) -> Traffic | None:
        """The expert traffic of all requests, since an ``earlier`` reading or since the start.

        None if all experts are resident.
        """
        if (log := self.model.store.traffic_log) is None:
            return None
        current = log.traffic()
        return current if earlier is None else current - earlier

    def set_recorder(self, recorder: Recorder | None) -> None:
        """Replace the recorder between two steps; None records nothing."""
        self._recorder = recorder

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """The use of the prefix cache since the start, and its size now."""
        return self._prefixes.cache.stats

    def reset_cache(self) -> None:
        """Reset the expert cache to its initial state; RuntimeError while a request is active."""
        if self._active:
            raise RuntimeError("an active request may need the cached experts")
        self.model.store.reset()

    def _active_sequence(self, number: int) -> ActiveSequence:
        if number not in self._active:
            ended = 0 <= number < self._next_number
            hint = ": it has ended, and its Finished event held the result" if ended else ""
            raise GenerationError(f"there is no active request {number}{hint}")
        return self._active[number]

    def _request(self, prompt: Prompt, generation: GenerationConfig) -> DecodeRequest:
        return make_request(
            self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else _read_ids(prompt),
            generation,
            mask_id=self.model.mask_id,
            stop_ids=self.model.eos_ids,
            vocabulary=self.model.spec.vocabulary,
            max_length=self.model.spec.max_length,
            edit_ids=self.model.family.defaults.edit_ids,
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
            text=active.next_text(self.model.tokenizer.decode),
            committed=update.committed,
            edited=update.edited,
            remasked=update.remasked,
            provisional=update.provisional,
            experts=() if counts is None else tuple(map(int, counts.per_layer)),
            vanilla_experts=() if counts is None else tuple(map(int, counts.vanilla_per_layer)),
            vote_mass_kept=None if counts is None else counts.vote_mass_kept,
            reuse_vote_loss=None if counts is None else counts.reuse_vote_loss,
        )


def load(
    name_or_path: str | Path | None = None,
    *,
    policy: str | Policy = "vanilla",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    expert_dtype: str | None = None,
    dense_dtype: str | None = None,
    expert_memory: str | ExpertMemoryConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    graphs: bool = True,
    prefill_chunk: int | None = None,
    prefix_cache_bytes: int = 0,
    **options: object,
) -> Engine:
    """An engine for a model folder, a hub id, or (None) the embedded model; see ``load_model``.

    ``graphs``, ``prefill_chunk`` and ``prefix_cache_bytes`` are those of ``Engine``. ``options``
    are fields of ``GenerationConfig`` that each request gets by default.
    """
    if "experts" in options:
        raise ConfigError("`experts` is now `expert_dtype`")
    resolved_policy = _policy(policy)
    model = load_model(
        name_or_path,
        dtype=dtype,
        device=device,
        expert_dtype=expert_dtype,
        dense_dtype=dense_dtype,
        expert_memory=expert_memory,
        on_progress=on_progress,
    )
    default = GenerationConfig.for_family(model.defaults)
    return Engine(
        model,
        policy=resolved_policy,
        generation=default.replace(**options),
        graphs=graphs,
        prefill_chunk=prefill_chunk,
        prefix_cache_bytes=prefix_cache_bytes,
    )


def _is_one_prompt(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is text or a row of ids; a tensor or an array of two axes is many prompts."""
    rows = () if isinstance(prompt, str) else prompt
    return not any(getattr(row, "ndim", isinstance(row, Sequence)) for row in rows)


def _read_ids(prompt: Sequence[int]) -> list[int]:
    """The ids as ``int``, from any integers: those of NumPy and PyTorch too."""
    try:
        return [operator.index(value) for value in prompt]
    except TypeError as error:
        raise GenerationError(f"a prompt is text or token ids: {error}") from None


def _check_joined_commits(
    request: DecodeRequest, generation: GenerationConfig, policy: Policy
) -> None:
    """Raises ConfigError if a joined commit would be routed unlike one on its own."""
    joined = request.kv_scheme.base.joins_commits and generation.commit_routing == "policy"
    if joined and needs_importance(policy):
        raise ConfigError(
            f"{_policy_name(policy)} routes by the attention that tokens get, and "
            f"{request.kv_scheme} adds that of the next block; "
            "use commit=separate, or vanilla commits"
        )


def _policy(policy: str | Policy) -> Policy:
    return parse_policy(policy) if isinstance(policy, str) else policy


def _policy_name(policy: Policy) -> str:
    """The spec of a policy in ``POLICIES``, or the ``repr`` of a user-defined one."""
    return format_policy(policy) if type(policy) in POLICIES.values() else repr(policy)
