"""KV schemes: which positions each forward of a row computes.

Keys and values are written by position and a later write wins, so a scheme has no state: the next
forward follows from the block and the number of forwards so far (``StepCounter``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from coterie.decoding.canvas import Block, split_into_blocks
from coterie.errors import SpecError
from coterie.specs import NonNegativeInt, PositiveInt, check_options, format_spec, parse_spec

PassKind = Literal["prefill", "decode", "refresh", "commit"]


@dataclass(frozen=True)
class ForwardPass:
    """One forward of one row: it computes ``start .. stop`` and attends to keys before ``visible``.

    Positions ``voters[0] .. voters[1]`` vote on experts. ``causal_block`` > 0 makes attention
    block-causal inside the window. Without ``use_cache`` it attends only to the window, and its
    keys are not stored. The first ``committed`` positions are the previous block; a denoising pass
    writes its final keys on the way. ``skipped`` positions of the window are not computed: the pass
    attends to their cached keys.
    """

    start: int
    stop: int
    visible: int
    kind: PassKind = "decode"
    voters: tuple[int, int] = (0, 0)
    causal_block: int = 0
    use_cache: bool = True
    committed: int = 0
    skipped: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """How many positions it computes."""
        return self.stop - self.start - len(self.skipped)

    @cached_property
    def positions(self) -> Tensor:
        """The positions [width] that it computes, in order."""
        window = torch.arange(self.start, self.stop)
        if not self.skipped:
            return window
        return window[~torch.isin(window, torch.tensor(self.skipped))]

    @property
    def is_denoising(self) -> bool:
        """Whether its logits are used. Other passes only write keys."""
        return self.kind in ("decode", "refresh")

    @property
    def final_stop(self) -> int:
        """The end of the keys, from ``start`` on, that it writes and no later pass replaces."""
        return self.start + self.committed if self.is_denoising else self.stop


@dataclass(frozen=True)
class Prefill:
    """How a prompt's keys are written. Positions before ``start`` have keys already.

    One pass computes at most ``width`` positions; None: all of them.
    """

    start: int = 0
    width: int | None = None


WHOLE_PROMPT = Prefill()


@dataclass(frozen=True)
class StepCounter:
    """Denoising forwards so far, of the row and of its current block."""

    total: int = 0
    in_block: int = 0

    @property
    def before_block(self) -> int:
        """The row's forwards before the current block."""
        return self.total - self.in_block


class BaseKVScheme(Protocol):
    """A KV scheme without additions; a frozen dataclass of options."""

    @property
    def aligned(self) -> bool:
        """Whether block borders are multiples of the width, not counted from the prompt."""
        ...

    @property
    def whole_blocks(self) -> bool:
        """Whether the last block is not cut off at the last new token."""
        ...

    @property
    def writes_kv(self) -> bool:
        """Whether the prompt and each finished block are computed once for their final keys."""
        ...

    @property
    def encodes(self) -> bool:
        """Whether passes that only write keys are causal from token to token, as in an encoder."""
        ...

    @property
    def joins_commits(self) -> bool:
        """Whether the first forward of a block also writes the final keys of the previous one."""
        ...

    def next_pass(self, block: Block, length: int, steps: StepCounter) -> ForwardPass:
        """The next denoising forward of a block on a canvas of this length."""
        ...


@dataclass(frozen=True)
class NoCache:
    """Every forward computes the whole row (LLaDA)."""

    aligned: bool = False

    whole_blocks = writes_kv = encodes = joins_commits = False

    def next_pass(self, block: Block, length: int, steps: StepCounter) -> ForwardPass:
        return ForwardPass(0, length, length, voters=(block.start, block.stop), use_cache=False)


@dataclass(frozen=True)
class PrefixCache:
    """The first forward of a block computes the row, later ones from the block on (Fast-dLLM)."""

    aligned: bool = False

    whole_blocks = writes_kv = encodes = joins_commits = False

    def next_pass(self, block: Block, length: int, steps: StepCounter) -> ForwardPass:
        if steps.in_block == 0:
            return _refresh_pass(block, length)
        return ForwardPass(block.start, length, length, voters=(block.start, block.stop))


@dataclass(frozen=True)
class DualCache:
    """The first forward of a block computes the row, later ones the block and its surroundings.

    These are ``before`` and ``after`` positions; cached keys serve the rest of the row. Without
    surroundings this is the dual cache of Fast-dLLM, with them the vicinity cache of dInfer. The
    first ``warmup`` forwards of a row are uncached.
    """

    before: NonNegativeInt = 0
    after: NonNegativeInt = 0
    warmup: NonNegativeInt = 0
    aligned: bool = False

    whole_blocks = writes_kv = encodes = joins_commits = False
    __post_init__ = check_options

    def next_pass(self, block: Block, length: int, steps: StepCounter) -> ForwardPass:
        if steps.total < self.warmup:
            return ForwardPass(0, length, length, voters=(block.start, block.stop), use_cache=False)
        if steps.total == max(self.warmup, steps.before_block):
            return _refresh_pass(block, length)
        window = (max(0, block.start - self.before), min(length, block.stop + self.after))
        return ForwardPass(*window, length, voters=window)


@dataclass(frozen=True)
class BlockCausalCache:
    """Each block attends to itself and all earlier blocks, so cached keys are exact (LLaDA2, SDAR).

    The whole blocks of the prompt are prefilled. A finished block is computed once more without
    masks to store its final keys: in a forward of its own (a commit, counted separately), or with
    ``commit=joined`` in the first forward of the next block, which then reads experts for both.
    """

    commit: Literal["separate", "joined"] = "separate"

    aligned = whole_blocks = writes_kv = True
    encodes = False
    __post_init__ = check_options

    @property
    def joins_commits(self) -> bool:
        return self.commit == "joined"

    def next_pass(self, block: Block, length: int, steps: StepCounter) -> ForwardPass:
        voters = (block.start, block.stop)
        if not self.joins_commits or steps.in_block or block.index == 0:
            return ForwardPass(*voters, block.stop, voters=voters)
        width = block.width
        return ForwardPass(
            *(block.start - width, block.stop, block.stop),
            voters=voters,
            causal_block=width,
            committed=width,
        )


@dataclass(frozen=True)
class EncoderCache:
    """A causal encoder writes the keys of the prompt and of finished blocks (DiffusionGemma).

    The decoder computes a block that attends to all of itself and to these keys. The encoder
    replaces the keys that the decoder writes.
    """

    aligned = joins_commits = False
    whole_blocks = writes_kv = encodes = True

    def next_pass(self, block: Block, length: int, steps: StepCounter) -> ForwardPass:
        return ForwardPass(block.start, block.stop, block.stop, voters=(block.start, block.stop))


@dataclass(frozen=True)
class BlockCausalNoCache:
    """Block-causal attention; a forward computes everything up to the block (official LLaDA2)."""

    aligned = whole_blocks = True
    writes_kv = encodes = joins_commits = False

    def next_pass(self, block: Block, length: int, steps: StepCounter) -> ForwardPass:
        span = (block.start, block.stop)
        return ForwardPass(
            0, block.stop, block.stop, voters=span, causal_block=block.width, use_cache=False
        )


@dataclass(frozen=True)
class Unroll:
    """Several forwards run before the next check whether a block is finished (dInfer).

    One round runs for every ``tokens`` masks, at most ``most`` and at least ``least``; a round that
    starts with a refresh has two forwards. Forwards after the last mask change no token, but they
    count.
    """

    most: PositiveInt = 4
    tokens: PositiveInt = 8
    least: PositiveInt = 1

    __post_init__ = check_options

    def rounds(self, num_masked: int) -> int:
        return max(self.least, min(num_masked // self.tokens, self.most))


@dataclass(frozen=True)
class KVScheme:
    """What ``kv_cache`` names, a base and its addition: the forward passes of a row."""

    base: BaseKVScheme
    unroll: Unroll | None = None

    def blocks(
        self, prompt_length: int, max_new_tokens: int, block_length: int
    ) -> tuple[Block, ...]:
        """The blocks to fill, in order; the ``stop`` of the last is the length of the canvas."""
        return split_into_blocks(
            prompt_length,
            max_new_tokens,
            block_length,
            aligned=self.base.aligned,
            whole_blocks=self.base.whole_blocks,
        )

    def causal_block(self, block_length: int) -> int:
        """The width of a prompt's blocks: a position attends to its block and earlier ones."""
        return 1 if self.base.encodes else block_length

    def prefill_passes(
        self, first: Block, prefill: Prefill = WHOLE_PROMPT
    ) -> tuple[ForwardPass, ...]:
        """The passes before the first block."""
        if not self.base.writes_kv:
            return ()
        causal_block, end = self.causal_block(first.width), first.start
        starts = range(prefill.start, end, prefill.width or max(1, end))
        spans = zip(starts, (*starts[1:], end), strict=False)
        return tuple(ForwardPass(*span, span[1], "prefill", span, causal_block) for span in spans)

    def next_pass(self, block: Block, length: int, steps: StepCounter) -> ForwardPass:
        """The next denoising forward of a block on a canvas of this length."""
        if self.unroll and _has_late_refresh(self.base, block, steps):
            return _refresh_pass(block, length)
        return self.base.next_pass(block, length, steps)

    def steps_until_check(
        self, block: Block, length: int, steps: StepCounter, num_masked: int
    ) -> int:
        """Denoising forwards until the next check whether the block is finished."""
        if self.unroll is None:
            return 1
        forwards = 0
        for _ in range(self.unroll.rounds(num_masked)):
            projected = StepCounter(steps.total + forwards, steps.in_block + forwards)
            forwards += 2 if self.next_pass(block, length, projected).kind == "refresh" else 1
        return forwards

    @property
    def caches_blocks(self) -> bool:
        """Whether a block's forwards find the keys of earlier ones in the cache."""
        return not isinstance(self.base, NoCache | BlockCausalNoCache)

    def with_separate_commits(self) -> KVScheme:
        """The same KV scheme, in which every denoising forward computes one block."""
        if not isinstance(self.base, BlockCausalCache):
            return self
        return replace(self, base=replace(self.base, commit="separate"))

    def commit_passes(self, block: Block) -> tuple[ForwardPass, ...]:
        """The passes between a finished block and the next one."""
        if not self.base.writes_kv or self.base.joins_commits:
            return ()
        span = (block.start, block.stop)
        causal_block = 1 if self.base.encodes else 0
        return (ForwardPass(*span, block.stop, "commit", span, causal_block),)

    def __str__(self) -> str:
        text = format_spec(self.base, KV_SCHEMES)
        return text if self.unroll is None else f"{text}+{format_spec(self.unroll, ADDITIONS)}"


def parse_kv_scheme(text: str) -> KVScheme:
    """The KV scheme of a text such as ``dual:before=16`` or ``prefix+unroll:most=4,tokens=8``."""
    first, *rest = text.split("+")
    if len(rest) > 1:
        raise SpecError(f"a KV scheme has at most one addition, not {len(rest)}: {text!r}")
    unroll = parse_spec(rest[0], ADDITIONS, "addition to a KV scheme") if rest else None
    return KVScheme(parse_spec(first, KV_SCHEMES, "KV scheme"), unroll)


def _refresh_pass(block: Block, length: int) -> ForwardPass:
    return ForwardPass(0, length, length, "refresh", (block.start, block.stop))


def _has_late_refresh(scheme: BaseKVScheme, block: Block, steps: StepCounter) -> bool:
    """If warm-up ends in a later block, dInfer records the block of its cache one round late."""
    if not isinstance(scheme, DualCache) or scheme.warmup == 0 or block.index == 0:
        return False
    return steps.before_block <= scheme.warmup and steps.total == scheme.warmup + 2


KV_SCHEMES: dict[str, type[BaseKVScheme]] = {
    "uncached": NoCache,
    "prefix": PrefixCache,
    "dual": DualCache,
    "block-causal": BlockCausalCache,
    "block-causal-uncached": BlockCausalNoCache,
    "encoder": EncoderCache,
}
ADDITIONS = {"unroll": Unroll}
