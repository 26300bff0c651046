"""The engine: requests come in as rows, rows share forwards, events come out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from coterie.decoding import Ask, Change, Row
from coterie.decoding.canvas import Block
from coterie.decoding.plans import Kind
from coterie.engine.batch import NOBODY, Slot, forward, groups
from coterie.engine.config import Generation, ask
from coterie.engine.event import Denoised, Event, Experts, Finished, Result, Stuck
from coterie.engine.graph import Graphs
from coterie.engine.load import Model, load_model
from coterie.engine.memory import Memory
from coterie.engine.pool import Pool
from coterie.experts.traffic import Traffic
from coterie.model.weights import expert_bytes
from coterie.naming import CoterieError
from coterie.routing import POLICIES, check_keeps, check_layers, parse_policy, spell
from coterie.telemetry import Counting, Recorder
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
        generation: Generation | None = None,
        watcher: Recorder = NOBODY,
        graphs: bool = True,
        every: bool = False,
    ) -> None:
        self.model = model
        self.policy = _policy(policy)
        self.generation = generation or Generation.usual(model.family.defaults)
        self._pool = Pool(model.spec, model.transformer.dtype, model.transformer.device)
        on_gpu = model.transformer.device.type == "cuda"
        self._graphs = Graphs(model.transformer) if graphs and on_gpu else None
        self._counting = Counting()
        self._watcher, self._every = watcher, every
        self._slots: dict[int, Slot] = {}
        self._mail: dict[int, deque[Event]] = {}
        self._told: list[Event] = []
        self._next = 0

    def generate(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: object
    ) -> Result:
        """The finished text of one prompt: ``stream``, exhausted."""
        *_, last = self.stream(prompt, policy=policy, **options)
        if not isinstance(last, Finished):
            raise RuntimeError("a stream ended without a result")
        return last.result

    def stream(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: object
    ) -> Iterator[Event]:
        """Events of one prompt, the last one ``Finished``. Closing the iterator frees the row."""
        number = self.submit(prompt, policy=policy, **options)
        events = self._deliver(number)
        next(events)  # a generator that has begun frees its row however it ends
        return events

    def submit(
        self, prompt: Prompt, *, policy: str | Policy | None = None, **options: object
    ) -> int:
        """Add a row; ``step`` works on it. ``options`` are the fields of ``Generation``."""
        generation = self.generation.but(**options)
        chosen = self.policy if policy is None else _policy(policy)
        check_layers(chosen, len(self.model.spec.moe_layers))
        if generation.drift is not None:
            check_keeps(chosen)
        row = Row(self._ask(prompt, generation))
        place = self._pool.take(row.canvas.length)
        slot = Slot(self._next, row, place, chosen, generation, moved=self.traffic())
        if row.ask.unmask.smooth is not None:
            whole = row.canvas.tokens[None].to(self.model.transformer.device)
            slot.embeddings = self.model.transformer.embed(whole)[0].clone()
        self._slots[slot.number] = slot
        self._next += 1
        return slot.number

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward for every row; rows of one width and policy share it.

        Returns the events of rows that no ``stream`` reads. Raises Stuck, once all rows have had
        their turn, if the logits of some are not finite: rows that shared a forward with these stay
        as they were, and events of the others are kept.
        """
        reason, stuck = "", []
        for group in groups(self._slots.values()):
            try:
                self._advance(group)
            except CoterieError as error:
                reason, stuck = reason or str(error), stuck + [slot.number for slot in group]
        if stuck:
            raise Stuck(reason, tuple(stuck))
        told, self._told = self._told, []
        return told

    def _advance(self, group: list[Slot]) -> None:
        asked = [(slot, slot.look, slot.row.block) for slot in group]
        with self._booked(group):
            changes = forward(
                self.model.transformer,
                self._pool,
                group,
                self._counting,
                self._watcher,
                graphs=self._graphs,
                every=self._every,
            )
        for (slot, look, block), change in zip(asked, changes, strict=True):
            if look.denoises:
                self._tell(self._denoised(slot, look.kind, block, change))
            if slot.row.look is None:
                self._tell(Finished(slot.number, self.result(slot.number)))
                self.cancel(slot.number)

    @contextmanager
    def _booked(self, group: Sequence[Slot]) -> Iterator[None]:
        """A forward in the ledger of a memory that does not hold all experts."""
        if (store := self.model.rationed) is None:
            yield
            return
        rows, blocks = ((s.number for s in group), (s.row.block.index for s in group))
        store.ledger.began(group[0].look.kind, tuple(rows), tuple(blocks))
        try:
            yield
        finally:
            store.ledger.ended()

    def cancel(self, number: int) -> None:
        """Forget a row, finished or not."""
        slot = self._slot(number)
        del self._slots[number]
        self._pool.give(slot.place)
        self._counting.forget(number)

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows still being worked on."""
        return tuple(self._slots)

    def row(self, number: int) -> Row:
        """The row itself: its canvas, its block, the forward it waits for."""
        return self._slot(number).row

    def result(self, number: int) -> Result:
        """What a row has come to so far."""
        slot, model = self._slot(number), self.model
        row, counts = slot.row, self._counting.counts(number)
        answer = row.answer
        size = expert_bytes(model.spec, model.transformer.dtype)
        return Result(
            text=model.codec.decode(answer),
            tokens=tuple(answer),
            finish_reason="stop" if row.stopped else "length",
            prompt_tokens=len(row.ask.prompt),
            new_tokens=len(answer),
            forwards=row.clock.row,
            prefills=slot.prefills,
            commits=slot.commits,
            blocks=row.block.index + 1,
            seconds=time.perf_counter() - slot.began,
            policy=_told(slot.policy),
            plan=str(row.ask.plan),
            unmask=str(row.ask.unmask),
            model=model.name,
            dtype=str(model.transformer.dtype).removeprefix("torch."),
            device=str(model.transformer.device),
            experts=Experts(
                total=model.spec.router.experts,
                forwards=counts.forwards,
                max=counts.max,
                mean=counts.mean,
                per_layer=counts.per_layer,
            ),
            expert_bytes=counts.mean * size,
            expert_bytes_vanilla=counts.vanilla_mean * size,
            vote_mass_kept=counts.vote_mass_kept,
            coresets_kept=counts.coresets_kept,
            drift=counts.drift,
            traffic=self.traffic(slot.moved),
        )

    def traffic(self, since: Traffic | None = None) -> Traffic | None:
        """What all rows' forwards moved, ``since`` an earlier reading or ever; None where all
        experts are in memory."""
        if (store := self.model.rationed) is None:
            return None
        now = store.ledger.traffic()
        return now if since is None else now - since

    def empty(self) -> None:
        """Let the experts' memory be as it was at first, so that what comes depends on nothing
        before. Raises RuntimeError while a row is on its way."""
        if self._slots:
            raise RuntimeError("a row on its way may need what is in memory")
        if self.model.rationed is not None:
            self.model.rationed.empty()

    def _slot(self, number: int) -> Slot:
        if number not in self._slots:
            raise CoterieError(f"there is no row {number}")
        return self._slots[number]

    def _ask(self, prompt: Prompt, generation: Generation) -> Ask:
        ids = self.model.codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return ask(
            ids,
            generation,
            mask=self.model.mask_id,
            stops=self.model.eos_ids,
            vocabulary=self.model.spec.vocabulary,
            longest=self.model.spec.max_length,
        )

    def _deliver(self, number: int) -> Iterator[Event]:
        mail = self._mail[number] = deque[Event]()
        try:
            yield Denoised(number)
            while mail or number in self._slots:
                if mail:
                    yield mail.popleft()
                else:
                    self._told += self.step()
        finally:
            del self._mail[number]
            if number in self._slots:
                self.cancel(number)

    def _tell(self, event: Event) -> None:
        self._mail.get(event.row, self._told).append(event)

    def _denoised(self, slot: Slot, kind: Kind, block: Block, change: Change) -> Denoised:
        prompt = slot.row.canvas.prompt
        counts = self._counting.latest(slot.number) if kind == "decode" else None
        return Denoised(
            row=slot.number,
            forward=slot.row.clock.row,
            kind=kind,
            block=block.index,
            start=block.start - prompt,
            stop=block.stop - prompt,
            committed=change.committed,
            edited=change.edited,
            provisional=change.provisional,
            experts=() if counts is None else tuple(map(int, counts.per_layer)),
            vote_mass_kept=None if counts is None else counts.vote_mass_kept,
            drift=None if counts is None else counts.drift,
        )


def load(
    name_or_path: str | Path | None = None,
    *,
    policy: str | Policy = "vanilla",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    experts: str | None = None,
    expert_memory: str | Memory | None = None,
    progress: Callable[[int, int], None] | None = None,
    graphs: bool = True,
    **options: object,
) -> Engine:
    """An engine over a folder, a hub id, or (None) the embedded model; see ``load_model``.

    ``graphs``: a GPU keeps decoding forwards and plays them again (on a CPU this says nothing).
    ``options`` are fields of ``Generation``: what a request gets where it asks for nothing else.
    """
    chosen = _policy(policy)
    model = load_model(
        name_or_path,
        dtype=dtype,
        device=device,
        experts=experts,
        expert_memory=expert_memory,
        progress=progress,
    )
    usual = Generation.usual(model.family.defaults)
    return Engine(model, policy=chosen, generation=usual.but(**options), graphs=graphs)


def _policy(policy: str | Policy) -> Policy:
    return parse_policy(policy) if isinstance(policy, str) else policy


def _told(policy: Policy) -> str:
    """Its spelling; a policy of the caller's own, outside the table, tells of itself."""
    return spell(policy) if type(policy) in POLICIES.values() else repr(policy)
