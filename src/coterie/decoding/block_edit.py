"""Rules that edit a block: tokens are written and replaced, and positions vanish or are inserted.

A model writes DELETE to drop a position, and SPLIT to insert a mask before it (LLaDA2.2). The block
keeps its width: masks fill it up, and what no longer fits is cut off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from coterie.decoding.sampling import Proposal
from coterie.decoding.unmask import even_share
from coterie.specs import NonNegativeInt, PositiveInt, UnitFraction, check_options

REDRAWS = 5  # attempts to leave a state that was seen before


@dataclass(frozen=True)
class EditIds:
    """The tokens that are no text."""

    mask: int
    delete: int
    split: int

    @property
    def all(self) -> tuple[int, int, int]:
        return self.mask, self.delete, self.split


@dataclass(frozen=True)
class EditState:
    """The state of one block between two forwards."""

    ids: EditIds
    tokens: tuple[int, ...]
    prompt: int  # the first positions, which belong to the prompt and never change
    original: tuple[bool, ...]  # was a mask at the start; moves with its token
    sources: tuple[int, ...]  # the position before the last forward; -1 = inserted
    initial_masks: int
    step: int = 0  # forwards so far
    post: int = 0  # forwards without original masks
    seen: frozenset[tuple[int, ...]] = frozenset()  # as each rule defines it
    written: frozenset[tuple[int, int]] = frozenset()  # all (position, token) so far
    done: bool = False

    @staticmethod
    def start(tokens: Sequence[int], prompt: int, ids: EditIds) -> EditState:
        original = tuple(i >= prompt for i in range(len(tokens)))
        masks = sum(original)
        sources = tuple(range(len(tokens)))
        return EditState(ids, tuple(tokens), prompt, original, sources, masks, done=masks == 0)

    @property
    def masks(self) -> list[int]:
        """The masked positions."""
        return [i for i in range(self.prompt, len(self.tokens)) if self.tokens[i] == self.ids.mask]

    @property
    def original_masks(self) -> list[int]:
        return [i for i in self.masks if self.original[i]]

    def unchanged(self) -> EditState:
        """The state after a forward that changes nothing."""
        return replace(self, sources=tuple(range(len(self.tokens))), step=self.step + 1)

    def edited(self, written: Sequence[int]) -> EditState:
        """The state after ``written`` [w], with DELETE and SPLIT applied."""
        entries: list[tuple[int, bool, int]] = []  # token, original, source
        for i, token in enumerate(written):
            if i >= self.prompt and token == self.ids.delete:
                continue
            is_split = i >= self.prompt and token == self.ids.split
            if is_split:
                entries.append((self.ids.mask, False, -1))
            entries.append((self.tokens[i] if is_split else token, self.original[i], i))
        width = len(self.tokens)
        entries = (entries + [(self.ids.mask, False, -1)] * width)[:width]
        tokens, original, sources = zip(*entries, strict=True)
        return replace(self, tokens=tokens, original=original, sources=sources, step=self.step + 1)


@dataclass
class Predictions:
    """The model's token and its probability at each of w positions; a rule may change them."""

    logits: Tensor  # [w, V]
    proposal: Proposal
    ids: list[int] = field(init=False)
    confidence: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.ids, self.confidence = self.proposal.ids.tolist(), self.proposal.confidence.tolist()

    def replace(self, positions: Iterable[int], forbidden: Collection[int]) -> None:
        """At these positions, a ``forbidden`` token gives way to the best other one."""
        for i in positions:
            if self.ids[i] in forbidden:
                self.take_other(i, forbidden)

    def take_other(self, position: int, forbidden: Collection[int]) -> None:
        """The token with the greatest logit at a position that is not ``forbidden``."""
        row = self.logits[position].float()
        allowed = row.clone()
        allowed[torch.tensor(sorted(forbidden), device=row.device)] = float("-inf")
        token = int(allowed.argmax())
        self.ids[position] = token
        self.confidence[position] = float(torch.softmax(row, dim=-1)[token])

    def confidence_after(
        self, before: EditState, after: EditState, confidence: Sequence[float]
    ) -> list[float]:
        """The confidence [w] of the tokens after a forward; that of kept tokens moves along."""
        new = []
        for token, source in zip(after.tokens, after.sources, strict=True):
            is_kept = source >= 0 and token == before.tokens[source] != before.ids.mask
            kept_or_new = confidence if is_kept else self.confidence
            new.append(0.0 if source < 0 else kept_or_new[source])
        return new


@runtime_checkable
class BlockEditRule(Protocol):
    """A rule that edits a block; a frozen dataclass of options."""

    def advance(
        self, state: EditState, predictions: Predictions, generator: torch.Generator
    ) -> EditState:
        """The state after a forward."""
        ...


@dataclass(frozen=True)
class JointEditRule:
    """Writes masks with confidence above ``p``, replaces tokens with confidence above ``edit_p``,
    and applies DELETE and SPLIT (LLaDA2.2, the released rule).

    At least an even share of the masks over ``steps`` forwards is written. After ``post`` forwards
    without a mask of the start, a last one writes all masks and edits no position away. A state
    that was written before is left by a random change.
    """

    p: UnitFraction = 0.5
    edit_p: UnitFraction = 0.0
    post: NonNegativeInt = 16
    steps: PositiveInt = 32
    limit: PositiveInt = 1000

    __post_init__ = check_options

    def advance(
        self, state: EditState, predictions: Predictions, generator: torch.Generator
    ) -> EditState:
        masks, originals, ids = state.masks, state.original_masks, state.ids
        state = replace(state, post=0 if originals else state.post + 1)
        share = even_share(state.initial_masks, self.steps, state.step)
        need = share + len(masks) - len(originals)
        filled = masks
        if state.step < self.steps:
            filled = most_certain(masks, predictions.confidence, self.p, need)
        is_last = state.step + 1 >= self.limit
        is_final = state.post >= self.post > 0 or is_last
        if self.post == 0:
            is_final = is_last or (bool(originals) and set(originals) <= set(filled))
        if is_final:
            filled = masks
        changed = [*filled, *replaceable(state, predictions, self.edit_p)]
        if is_final:
            predictions.replace(changed, ids.all if is_last else (ids.delete, ids.split))
        written = write(state, predictions, changed)
        if not is_final:
            written = self._unseen(state, written, predictions, generator)
        after = state.edited(written)
        no_masks = not after.masks
        stable = no_masks and after.tokens == state.tokens
        done = stable or is_last or (no_masks and state.post >= self.post)
        return replace(after, seen=state.seen | {tuple(written)}, done=done)

    def _unseen(
        self,
        state: EditState,
        written: list[int],
        predictions: Predictions,
        generator: torch.Generator,
    ) -> list[int]:
        """``written``, with random positions changed until it was not seen before."""
        for _ in range(REDRAWS):
            changed = [i for i, token in enumerate(written) if token != state.tokens[i]]
            if tuple(written) not in state.seen or not changed:
                break
            i = changed[int(torch.randint(len(changed), (1,), generator=generator))]
            predictions.take_other(i, (written[i],))
            written[i] = predictions.ids[i]
        return written


@dataclass(frozen=True)
class JointThresholdInDelRule:
    """The rule of the same name in SGLang 0.5.23; it draws nothing.

    Unlike ``joint-edit``, it writes at least one mask of the start and never restarts the count of
    ``post``. The last forward also comes after as many forwards as the block has positions and
    ``post``. If an input returns, the least certain change gets a token that was never written
    at its position.
    """

    p: UnitFraction = 0.5
    edit_p: UnitFraction = 0.0
    post: NonNegativeInt = 16

    __post_init__ = check_options

    def advance(
        self, state: EditState, predictions: Predictions, generator: torch.Generator
    ) -> EditState:
        masks, originals, ids = state.masks, state.original_masks, state.ids
        state = replace(state, post=state.post + (not originals))
        is_final = state.step >= len(state.tokens) + self.post
        is_final = is_final or (not originals and state.post >= self.post)
        is_final = is_final or (state.post >= self.post > 0)
        filled = masks
        if not is_final and originals:
            # A mask of the start is never written as a mask again.
            predictions.replace(originals, (ids.mask,))
            need = 1 + len(masks) - len(originals)
            filled = most_certain(masks, predictions.confidence, self.p, need)
        if self.post == 0 and originals and set(originals) <= set(filled):
            is_final, filled = True, masks
        changed = [*filled, *replaceable(state, predictions, self.edit_p)]
        if not changed:
            return replace(state.unchanged(), done=True)
        if is_final:
            predictions.replace(changed, ids.all)
        elif state.tokens in state.seen:
            self._vary(state, changed, predictions)
        after = state.edited(write(state, predictions, changed))
        return replace(
            after,
            seen=state.seen | {state.tokens},
            written=state.written | {(i, predictions.ids[i]) for i in changed},
            done=is_final,
        )

    def _vary(self, state: EditState, changed: list[int], predictions: Predictions) -> None:
        """Another token at the least certain position that would change."""
        differing = [i for i in sorted(changed) if predictions.ids[i] != state.tokens[i]]
        if not differing:
            return
        i = min(differing, key=lambda position: predictions.confidence[position])
        forbidden = {token for position, token in state.written if position == i}
        if i in state.original_masks:
            forbidden.add(state.ids.mask)
        if forbidden:
            predictions.take_other(i, forbidden)


def most_certain(
    masks: list[int], confidence: Sequence[float], threshold: float, need: int
) -> list[int]:
    """The masks above the threshold, or if they are too few, the ``need`` most certain ones."""
    certain = [i for i in masks if confidence[i] > threshold]
    if len(certain) >= need:
        return certain
    return sorted(masks, key=lambda i: (-confidence[i], i))[:need]


def replaceable(state: EditState, predictions: Predictions, threshold: float) -> list[int]:
    """The positions with a token that the model would replace."""
    return [
        i
        for i in range(state.prompt, len(state.tokens))
        if state.tokens[i] != state.ids.mask
        and predictions.ids[i] != state.tokens[i]
        and predictions.confidence[i] > threshold
    ]


def write(state: EditState, predictions: Predictions, positions: Iterable[int]) -> list[int]:
    """The tokens [w] with those predicted at ``positions``."""
    tokens = list(state.tokens)
    for i in positions:
        tokens[i] = predictions.ids[i]
    return tokens
