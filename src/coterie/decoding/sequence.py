"""The state machine of one request: forward, propose, commit, and the next forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from coterie.decoding.block_edit import BlockEditRule, EditIds, EditState, Predictions
from coterie.decoding.canvas import Block, Canvas
from coterie.decoding.kv_schemes import WHOLE_PROMPT, ForwardPass, KVScheme, Prefill, StepCounter
from coterie.decoding.refinements import UnmaskStrategy
from coterie.decoding.sampling import Proposal, Sampling, propose
from coterie.decoding.unmask import NEG_INF, BlockState, EntropyRule, RenoiseRule, top_positions
from coterie.values import LogitsSummary

EarlyStop = Literal["off", "block", "token"]


@dataclass(frozen=True)
class DecodeRequest:
    """The parameters of one row. ``eos_ids`` are the end-of-text ids."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    block_length: int
    kv_scheme: KVScheme
    unmask: UnmaskStrategy
    sampling: Sampling
    seed: int
    early_stop: EarlyStop
    eos_ids: tuple[int, ...]
    mask_id: int
    vocabulary: int = 0  # for rules that draw random tokens
    edit_ids: tuple[int, int] | None = None  # DELETE and SPLIT, for a rule that edits blocks
    prefill: Prefill = WHOLE_PROMPT
    skip_settled: int | None = None  # forwards that compute a token before it is skipped


@dataclass(frozen=True)
class Token:
    """A new token; ``position`` counts from the first one, ``confidence`` is a probability."""

    position: int
    id: int
    confidence: float


@dataclass(frozen=True)
class BlockUpdate:
    """The changes that one forward makes to the block of a row."""

    committed: tuple[Token, ...] = ()
    edited: tuple[Token, ...] = ()
    remasked: tuple[int, ...] = ()  # positions that hold a mask again
    provisional: tuple[Token, ...] = ()  # proposed, still masked


class SequenceState:
    """The state of one request. Mutable: ``receive`` takes the result of each forward.

    ``next_pass`` is the forward that the request waits for, None at the end. ``stopped_early``
    means that an end-of-text ended the answer inside a block.
    """

    def __init__(self, request: DecodeRequest) -> None:
        self.request = request
        self.blocks = request.kv_scheme.blocks(
            len(request.prompt_ids), request.max_new_tokens, request.block_length
        )
        self.canvas = Canvas(request.prompt_ids, self.blocks[-1].stop, request.mask_id)
        self.block = self.blocks[0]
        self.steps = StepCounter()
        self._generator = torch.Generator().manual_seed(request.seed)
        self._enter_block(self.block)
        self._pass_iterator = self._passes()
        self.next_pass: ForwardPass | None = next(self._pass_iterator, None)

    def _passes(self) -> Iterator[ForwardPass]:
        """The forward passes of the row in order; ``receive`` fills the canvas between them."""
        kv_scheme, length = self.request.kv_scheme, self.canvas.length
        yield from kv_scheme.prefill_passes(self.blocks[0], self.request.prefill)
        for block in self.blocks:
            self._enter_block(block)
            while not self._is_block_done():
                num_masked = int(self.canvas.is_masked(block.start, block.stop).sum())
                for _ in range(kv_scheme.steps_until_check(block, length, self.steps, num_masked)):
                    yield self.without_settled(kv_scheme.next_pass(block, length, self.steps))
                    if self.stopped_early:
                        return
            if block is self.blocks[-1] or (
                self.request.early_stop != "off" and self._has_complete_answer()
            ):
                return
            yield from kv_scheme.commit_passes(block)

    def without_settled(self, window: ForwardPass) -> ForwardPass:
        """The pass without the tokens that ``skip_settled`` forwards of the block have computed.

        Their keys are in the cache. A block without masks is computed whole.
        """
        block, least = self.block, self.request.skip_settled
        if least is None or window.kind != "decode" or not window.use_cache:
            return window
        if self.canvas.is_filled(block.start, block.stop):
            return window
        settled = block.start + (self._token_forwards >= least).nonzero()[:, 0]
        return replace(window, skipped=tuple(settled.tolist()))

    def logits_positions(self, computed: Tensor) -> Tensor:
        """Those of the ``computed`` positions [n] of the block that need logits.

        These are the masked ones, or all of them for editing, credit, smoothing and sampling.
        """
        unmask, sampling = self.request.unmask, self.request.sampling
        masked = self.canvas.tokens[computed] == self.request.mask_id
        needs_all = unmask.edits or unmask.credit or unmask.smooth or sampling.temperature
        return computed if needs_all or not bool(masked.any()) else computed[masked]

    def input_tokens(self, window: ForwardPass) -> Tensor:
        """The tokens [width] that a pass computes: noise in place of masks if the rule renoises."""
        tokens = self.canvas.tokens[window.positions]
        if self._noise is None or not window.is_denoising:
            return tokens
        return self._noise.where(tokens == self.request.mask_id, tokens)

    @property
    def temperature(self) -> float:
        """The temperature of the next draw; a request's own replaces the schedule of a rule."""
        rule, temperature = self.request.unmask.rule, self.request.sampling.temperature
        if temperature or not isinstance(rule, RenoiseRule):
            return temperature
        return rule.temperature(self.steps.in_block)

    def receive(
        self,
        logits: Tensor | None,
        summary: LogitsSummary | None = None,
        indices: Tensor | None = None,
    ) -> BlockUpdate:
        """Takes the result of ``next_pass`` and moves on to the following pass.

        logits [n, V] of a denoising pass belong to the positions ``indices`` of the block, or to
        the whole block; other passes have None. ``summary`` is that of the logits, if it is known.
        Raises NonFiniteLogitsError and leaves the state as it was.
        """
        update = BlockUpdate() if logits is None else self._denoise(logits, summary, indices)
        self.next_pass = next(self._pass_iterator, None)
        return update

    def _denoise(
        self, logits: Tensor, summary: LogitsSummary | None, indices: Tensor | None
    ) -> BlockUpdate:
        unmask, block = self.request.unmask, self.block
        masked = self.canvas.is_masked(block.start, block.stop)
        if isinstance(unmask.rule, RenoiseRule):
            return self._renoise(unmask.rule, masked, logits, summary)
        memory = self._credit_memory
        if unmask.credit is not None:
            if indices is not None:
                logits = _spread(logits, indices, block.width)
            logits, memory = unmask.credit.add_credit(logits, masked, memory)
            summary = indices = None
        needs_entropy = isinstance(unmask.rule, EntropyRule)
        sampling, mask_id = self.request.sampling, self.request.mask_id
        proposal = propose(
            logits, sampling, mask_id, self._generator, entropy=needs_entropy, summary=summary
        )
        if isinstance(unmask.rule, BlockEditRule):
            return self._edit_block(unmask.rule, logits, proposal)
        if indices is not None:
            proposal = proposal.scatter(indices, block.width)
        state = self._block_state(proposal, masked)
        ids, commit = self._select_commits(state)
        edit = torch.zeros_like(commit)
        if unmask.edit is not None and not self._edit_limit_reached():
            edit = unmask.edit.choose(state)
        self._credit_memory = memory
        self._write(state, ids, commit | edit)
        return self._block_update(state, ids, commit, edit)

    def _renoise(
        self, rule: RenoiseRule, masked: Tensor, logits: Tensor, summary: LogitsSummary | None
    ) -> BlockUpdate:
        """Keeps some drawn tokens for the next step, or ends the block with the most probable."""
        mask_id, sampling = self.request.mask_id, self.request.sampling
        at_temperature = replace(sampling, temperature=self.temperature)
        drawn = propose(logits, at_temperature, mask_id, self._generator, entropy=True, sort=False)
        best = propose(logits, Sampling(), mask_id, self._generator, summary=summary)
        assert drawn.entropy is not None
        kept = rule.choose(self._block_state(drawn, masked))
        self._noise = drawn.ids.where(kept, self._random_tokens())
        self._best.append(best.ids)
        is_final = rule.is_final(self.steps.in_block, self._best, drawn.entropy)
        commit = masked if is_final else torch.zeros_like(masked)
        state = self._block_state(best, masked)
        self._write(state, best.ids, commit)
        return self._block_update(state, best.ids, commit, torch.zeros_like(masked))

    def _random_tokens(self) -> Tensor:
        size = (self.block.width,)
        return torch.randint(self.request.vocabulary, size, generator=self._generator)

    def _block_state(self, proposal: Proposal, masked: Tensor) -> BlockState:
        block, smooth = self.block, self.request.unmask.smooth
        return BlockState(
            proposal,
            tokens=self.canvas.tokens[block.start : block.stop].clone(),
            masked=masked,
            generated=self.canvas.is_generated(block.start, block.stop),
            mask_id=self.request.mask_id,
            step=self.steps.in_block,
            initial_masked=self._initial_masked,
            threshold_floor=NEG_INF if smooth is None else smooth.threshold_floor(self.steps.total),
        )

    def _select_commits(self, state: BlockState) -> tuple[Tensor, Tensor]:
        """Ids to write and the mask of positions, [w] each: the rule's choice, else the best one.

        A proposal can be the mask itself, so the rule may choose no new token. Published loops
        repeat such a forward forever; this one writes the most confident token.
        """
        proposal = state.proposal
        if not bool(state.masked.any()):
            return proposal.ids, state.masked
        if self._edit_limit_reached():
            return proposal.unmasked_ids, state.masked
        rule = self.request.unmask.rule
        assert not isinstance(rule, BlockEditRule)
        selected = rule.choose(state) & state.masked
        if bool((selected & (proposal.ids != state.mask_id)).any()):
            return proposal.ids, selected
        return proposal.unmasked_ids, top_positions(state.confidence, 1)

    def _write(self, state: BlockState, ids: Tensor, write_mask: Tensor) -> None:
        block, canvas = self.block, self.canvas
        eos_written = write_mask & torch.isin(
            ids, torch.tensor(self.request.eos_ids, dtype=torch.int64)
        )
        canvas.write(block, write_mask, ids)
        updated = write_mask | state.masked
        span = canvas.confidence[block.start : block.stop]
        span[updated] = state.proposal.confidence_of(ids)[updated]
        if not bool(state.masked.any()):
            self._edit_forwards += 1
            self._edits_converged = not bool(write_mask.any())
        self._token_forwards += ~state.masked
        self.steps = StepCounter(self.steps.total + 1, self.steps.in_block + 1)
        self.stopped_early = (
            self.request.early_stop == "token"
            and bool(eos_written.any())
            and self._has_complete_answer()
        )

    def _edit_block(self, rule: BlockEditRule, logits: Tensor, proposal: Proposal) -> BlockUpdate:
        """One forward under a rule that edits the block; logits [w, V]."""
        block, before = self.block, self._edit_state
        assert before is not None
        predictions = Predictions(logits, proposal)
        after = before.unchanged()
        if not before.done:
            after = rule.advance(before, predictions, self._generator)
        self._edit_state = after
        span = slice(block.start, block.stop)
        confidence = predictions.confidence_after(
            before, after, self.canvas.confidence[span].tolist()
        )
        self.canvas.tokens[span] = torch.tensor(after.tokens, dtype=torch.int64)
        self.canvas.confidence[span] = torch.tensor(confidence)
        self.steps = StepCounter(self.steps.total + 1, self.steps.in_block + 1)
        return self._edit_update(before, after, predictions, confidence)

    def _edit_update(
        self,
        before: EditState,
        after: EditState,
        predictions: Predictions,
        confidence: Sequence[float],
    ) -> BlockUpdate:
        """The difference of two states, position by position."""
        first, mask = self.block.start - self.canvas.prompt_length, before.ids.mask
        committed, edited, remasked, provisional = [], [], [], []
        for i, (old, new) in enumerate(zip(before.tokens, after.tokens, strict=True)):
            token, source = Token(first + i, new, confidence[i]), after.sources[i]
            if new == mask:
                remasked += [first + i] if old != mask else []
                guess = mask if source < 0 else predictions.ids[source]
                if guess not in before.ids.all:
                    provisional.append(Token(first + i, guess, confidence[i]))
            elif old == mask:
                committed.append(token)
            elif old != new:
                edited.append(token)
        return BlockUpdate(tuple(committed), tuple(edited), tuple(remasked), tuple(provisional))

    def _block_update(
        self, state: BlockState, ids: Tensor, commit: Tensor, edit: Tensor
    ) -> BlockUpdate:
        commit = commit & (ids != state.mask_id)
        return BlockUpdate(
            committed=self._tokens(commit, ids, state),
            edited=self._tokens(edit, ids, state),
            provisional=self._tokens(state.masked & ~commit, state.proposal.unmasked_ids, state),
        )

    def _tokens(self, mask: Tensor, ids: Tensor, state: BlockState) -> tuple[Token, ...]:
        first = self.block.start - self.canvas.prompt_length
        indices = mask.nonzero()[:, 0].tolist()
        confidence = state.proposal.confidence_of(ids)
        return tuple(Token(first + i, int(ids[i]), float(confidence[i])) for i in indices)

    def _enter_block(self, block: Block) -> None:
        self.block = block
        self.steps = StepCounter(self.steps.total, 0)
        self._initial_masked = int(self.canvas.is_masked(block.start, block.stop).sum())
        self._token_forwards = torch.zeros(block.width, dtype=torch.int64)  # that computed a token
        self._credit_memory: Tensor | None = None  # of ``credit``
        self._edit_forwards = 0  # forwards that started without a mask
        self._edits_converged = False  # whether the last of them edited nothing
        self._edit_state = self._start_edits(block)
        self.stopped_early = False
        self._noise = self._random_tokens() if self.request.unmask.renoises else None
        self._best: list[Tensor] = []  # the most probable tokens of each step

    def _start_edits(self, block: Block) -> EditState | None:
        """The first state of a block under a rule that edits blocks."""
        if not isinstance(self.request.unmask.rule, BlockEditRule) or not self.request.edit_ids:
            return None
        tokens = self.canvas.tokens[block.start : block.stop].tolist()
        prompt = max(0, self.canvas.prompt_length - block.start)
        return EditState.start(
            tokens, prompt, EditIds(self.request.mask_id, *self.request.edit_ids)
        )

    def _is_block_done(self) -> bool:
        """Whether the block needs no further forward."""
        if self._edit_state is not None:
            return self._edit_state.done
        if not self.canvas.is_filled(self.block.start, self.block.stop):
            return False
        edit = self.request.unmask.edit
        return edit is None or self._edits_converged or self._edit_forwards >= edit.post

    def _edit_limit_reached(self) -> bool:
        """Whether the block has had too many forwards: edits can write masks again, without end."""
        edit = self.request.unmask.edit
        return edit is not None and self.steps.in_block >= 8 * self.block.width + edit.post

    def _has_complete_answer(self) -> bool:
        """Whether the answer has an end-of-text and no mask before it."""
        answer = self.canvas.tokens[self.canvas.prompt_length : self.block.stop].tolist()
        end = first_index_of(answer, self.request.eos_ids)
        return end is not None and self.request.mask_id not in answer[:end]

    @property
    def answer(self) -> list[int]:
        """The new tokens, at most ``max_new_tokens``, up to the first end-of-text."""
        tokens = self._new_tokens()[: self._eos_index()]
        return [token for token in tokens if token != self.request.mask_id]

    @property
    def final_tokens(self) -> list[int]:
        """The start of ``answer`` that no later forward changes; all of it at the end.

        Edits may still change a token of the current block.
        """
        if self.next_pass is None:
            return self.answer
        tokens = self._new_tokens()[: self._eos_index()]
        if self.request.unmask.edits:
            tokens = tokens[: max(0, self.block.start - self.canvas.prompt_length)]
        return tokens[: first_index_of(tokens, (self.request.mask_id,))]

    @property
    def ended_by_eos(self) -> bool:
        """Whether an end-of-text of the model ends the answer."""
        return self._eos_index() is not None

    def _new_tokens(self) -> list[int]:
        start = self.canvas.prompt_length
        return self.canvas.tokens[start : start + self.request.max_new_tokens].tolist()

    def _eos_index(self) -> int | None:
        """Where the first end-of-text ends the answer; None if it does not end early."""
        if self.request.early_stop == "off":
            return None
        return first_index_of(self._new_tokens(), self.request.eos_ids)


def _spread(logits: Tensor, indices: Tensor, width: int) -> Tensor:
    """Logits [width, V] from those [n, V] of positions ``indices``; 0 elsewhere."""
    if len(indices) == width:
        return logits
    zeros = logits.new_zeros(width, logits.shape[-1])
    return zeros.index_copy(0, indices.to(logits.device), logits)


def first_index_of(tokens: Sequence[int], targets: Sequence[int]) -> int | None:
    """Index of the first token that is one of ``targets``."""
    return next((i for i, token in enumerate(tokens) if token in targets), None)
