"""One request on its way over its canvas: look, propose, keep some, look again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coterie.decoding.canvas import Block, Canvas
from coterie.decoding.plans import Clock, Look, Plan
from coterie.decoding.refine import Unmask
from coterie.decoding.sampling import Proposal, Sampling, propose
from coterie.decoding.unmask import NEVER, Entropy, Moment, best
from coterie.values import Survey

EarlyStop = Literal["off", "block", "token"]


@dataclass(frozen=True)
class Ask:
    """What one row was asked for. ``stops``: end-of-text ids."""

    prompt: tuple[int, ...]
    new: int
    block: int
    plan: Plan
    unmask: Unmask
    sampling: Sampling
    seed: int
    early_stop: EarlyStop
    stops: tuple[int, ...]
    mask: int


@dataclass(frozen=True)
class Token:
    """``position`` counts from the row's first new token; ``confidence`` is a probability."""

    position: int
    id: int
    confidence: float


@dataclass(frozen=True)
class Change:
    """What one forward did to a row's block."""

    committed: tuple[Token, ...] = ()
    edited: tuple[Token, ...] = ()
    provisional: tuple[Token, ...] = ()  # proposed, still masked


class Row:
    """The loop over blocks and forwards (``looks``) and what one forward leads to (``receive``).

    Mutable: it is the state of one request. ``look`` is the forward it waits for, None at the end;
    ``cut`` says that an end-of-text ended it inside a block.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.blocks = ask.plan.blocks(len(ask.prompt), ask.new, ask.block)
        self.canvas = Canvas(ask.prompt, self.blocks[-1].stop, ask.mask)
        self.block = self.blocks[0]
        self.clock = Clock()
        self._generator = torch.Generator().manual_seed(ask.seed)
        self._enter(self.block)
        self._looks = self._journey()
        self.look: Look | None = next(self._looks, None)

    def _journey(self) -> Iterator[Look]:
        """Every forward of the row, in order; between two of them ``receive`` fills the canvas."""
        plan, length = self.ask.plan, self.canvas.length
        yield from plan.prefill(self.blocks[0])
        for block in self.blocks:
            self._enter(block)
            while not self._settled():
                masked = int(self.canvas.masked(block.start, block.stop).sum())
                for _ in range(plan.patience(block, length, self.clock, masked)):
                    yield plan.look(block, length, self.clock)
                    if self.cut:
                        return
            if block is self.blocks[-1] or (self.ask.early_stop != "off" and self._ended()):
                return
            yield from plan.commit(block)

    def wanted(self) -> Tensor:
        """Positions [n] of the block whose logits can change something, int64.

        Those that are masked; all where others are edited, remembered, or given a share of luck.
        """
        unmask, block = self.ask.unmask, self.block
        masked = self.canvas.masked(block.start, block.stop)
        others = unmask.edit or unmask.credit or unmask.smooth or self.ask.sampling.temperature
        if others or not bool(masked.any()):
            return torch.arange(block.width)
        return masked.nonzero()[:, 0]

    def receive(
        self, logits: Tensor | None, survey: Survey | None = None, at: Tensor | None = None
    ) -> Change:
        """Take the answer of the forward waited for and move on to the next.

        logits [n, V] where the look denoises, else None: those ``at`` positions that are wanted, or
        of the whole block. ``survey`` says what they say, if that is known. If they are not finite
        this raises, and the row is as it was.
        """
        change = Change() if logits is None else self._denoise(logits, survey, at)
        self.look = next(self._looks, None)
        return change

    def _denoise(self, logits: Tensor, survey: Survey | None, at: Tensor | None) -> Change:
        unmask, block = self.ask.unmask, self.block
        masked = self.canvas.masked(block.start, block.stop)
        memory = self._memory
        if unmask.credit is not None:
            logits, memory = unmask.credit.fuse(logits, masked, memory)
            survey = None
        doubts = isinstance(unmask.rule, Entropy)
        sampling, mask = self.ask.sampling, self.ask.mask
        proposal = propose(logits, sampling, mask, self._generator, entropy=doubts, survey=survey)
        if at is not None:
            proposal = proposal.spread(at, block.width)
        moment = self._moment(proposal, masked)
        ids, commit = self._commit(moment)
        edit = torch.zeros_like(commit)
        if unmask.edit is not None and not self._exhausted():
            edit = unmask.edit.choose(moment)
        self._memory = memory
        self._write(moment, ids, commit | edit)
        return self._change(moment, ids, commit, edit)

    def _moment(self, proposal: Proposal, masked: Tensor) -> Moment:
        block, smooth = self.block, self.ask.unmask.smooth
        return Moment(
            proposal,
            tokens=self.canvas.tokens[block.start : block.stop].clone(),
            masked=masked,
            answered=self.canvas.answered(block.start, block.stop),
            mask=self.ask.mask,
            step=self.clock.block,
            opened=self._opened,
            floor=NEVER if smooth is None else smooth.floor(self.clock.row),
        )

    def _commit(self, moment: Moment) -> tuple[Tensor, Tensor]:
        """Ids to write and where, [w] each: the rule's choice, or the best where it writes nothing.

        A proposal can be the mask itself, and a rule may then choose nothing that is new: published
        loops would repeat that forward for ever.
        """
        proposal = moment.proposal
        if not bool(moment.masked.any()):
            return proposal.ids, moment.masked
        if self._exhausted():
            return proposal.unmask, moment.masked
        chosen = self.ask.unmask.rule.choose(moment) & moment.masked
        if bool((chosen & (proposal.ids != moment.mask)).any()):
            return proposal.ids, chosen
        return proposal.unmask, best(moment.confidence, 1)

    def _write(self, moment: Moment, ids: Tensor, where: Tensor) -> None:
        block, canvas = self.block, self.canvas
        stopped = where & torch.isin(ids, torch.tensor(self.ask.stops, dtype=torch.int64))
        canvas.write(block, where, ids)
        seen = where | moment.masked
        span = canvas.confidence[block.start : block.stop]
        span[seen] = moment.proposal.sure(ids)[seen]
        if not bool(moment.masked.any()):
            self._after += 1
            self._quiet = not bool(where.any())
        self.clock = Clock(self.clock.row + 1, self.clock.block + 1)
        self.cut = self.ask.early_stop == "token" and bool(stopped.any()) and self._ended()

    def _change(self, moment: Moment, ids: Tensor, commit: Tensor, edit: Tensor) -> Change:
        commit = commit & (ids != moment.mask)
        return Change(
            committed=self._tokens(commit, ids, moment),
            edited=self._tokens(edit, ids, moment),
            provisional=self._tokens(moment.masked & ~commit, moment.proposal.unmask, moment),
        )

    def _tokens(self, where: Tensor, ids: Tensor, moment: Moment) -> tuple[Token, ...]:
        first = self.block.start - self.canvas.prompt
        places = where.nonzero()[:, 0].tolist()
        sure = moment.proposal.sure(ids)
        return tuple(Token(first + i, int(ids[i]), float(sure[i])) for i in places)

    def _enter(self, block: Block) -> None:
        self.block = block
        self.clock = Clock(self.clock.row, 0)
        self._opened = int(self.canvas.masked(block.start, block.stop).sum())
        self._memory: Tensor | None = None  # credit's
        self._after = 0  # forwards that began without a mask
        self._quiet = False  # the last of them edited nothing
        self.cut = False

    def _settled(self) -> bool:
        """Whether the block needs no further forward."""
        if not self.canvas.unmasked(self.block.start, self.block.stop):
            return False
        edit = self.ask.unmask.edit
        return edit is None or self._quiet or self._after >= edit.post

    def _exhausted(self) -> bool:
        """Edits may write masks again; nothing published bounds that."""
        edit = self.ask.unmask.edit
        return edit is not None and self.clock.block >= 8 * self.block.width + edit.post

    def _ended(self) -> bool:
        """Whether the answer holds an end-of-text with everything before it filled."""
        answer = self.canvas.tokens[self.canvas.prompt : self.block.stop].tolist()
        end = first_of(answer, self.ask.stops)
        return end is not None and self.ask.mask not in answer[:end]

    @property
    def answer(self) -> list[int]:
        """The new tokens: at most as many as asked for, up to the first end-of-text."""
        whole = self.canvas.tokens[self.canvas.prompt :].tolist()[: self.ask.new]
        end = first_of(whole, self.ask.stops) if self.ask.early_stop != "off" else None
        return [token for token in whole[:end] if token != self.ask.mask]

    @property
    def stopped(self) -> bool:
        """Whether the answer ends because the model ended it."""
        if self.ask.early_stop == "off":
            return False
        whole = self.canvas.tokens[self.canvas.prompt :].tolist()[: self.ask.new]
        return first_of(whole, self.ask.stops) is not None


def first_of(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Index of the first token that is one of ``wanted``."""
    return next((i for i, token in enumerate(tokens) if token in wanted), None)
