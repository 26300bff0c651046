"""Where to look: a caching scheme is a sequence of windows over one row.

Keys and values are written by position and a later write wins, so a plan needs no state: the next
look follows from the block and from how many forwards there were (``Clock``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from coterie.decoding.canvas import Block, lay_out
from coterie.naming import CoterieError
from coterie.spelling import Count, Whole, check_options, parse, spelled

Kind = Literal["prefill", "decode", "refresh", "commit"]


@dataclass(frozen=True)
class Look:
    """One forward of one row: compute ``start .. stop``, see keys before ``visible``.

    Who votes on experts: positions ``voters[0] .. voters[1]``. ``causal`` > 0: block-causal inside,
    with blocks of that width. ``cached`` False: the window is all there is, keys are not kept.
    """

    start: int
    stop: int
    visible: int
    kind: Kind = "decode"
    voters: tuple[int, int] = (0, 0)
    causal: int = 0
    cached: bool = True

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def denoises(self) -> bool:
        """Whether its logits are used; the others only write keys."""
        return self.kind in ("decode", "refresh")


@dataclass(frozen=True)
class Clock:
    """Denoising forwards so far: of the row, and of its present block."""

    row: int = 0
    block: int = 0

    @property
    def entered(self) -> int:
        """The row's forwards when the block was entered."""
        return self.row - self.block


@dataclass(frozen=True)
class Terms:
    """What a scheme needs of the rest of a plan."""

    aligned: bool = False  # block borders are multiples of the width; else they follow the prompt
    whole: bool = False  # the last block is not cut off at the last new token
    stores: bool = False  # prompt and finished blocks are computed for their keys alone


class Gaze(Protocol):
    """How a caching scheme looks at a block."""

    @property
    def terms(self) -> Terms: ...

    def look(self, block: Block, length: int, clock: Clock) -> Look:
        """The next denoising forward of a block on a canvas of this length."""
        ...


@dataclass(frozen=True)
class Uncached:
    """The whole row, every time (LLaDA)."""

    aligned: bool = False

    @property
    def terms(self) -> Terms:
        return Terms(self.aligned)

    def look(self, block: Block, length: int, clock: Clock) -> Look:
        return Look(0, length, length, voters=(block.start, block.stop), cached=False)


@dataclass(frozen=True)
class Prefix:
    """The whole row on entering a block, then from the block to the end (Fast-dLLM)."""

    aligned: bool = False

    @property
    def terms(self) -> Terms:
        return Terms(self.aligned)

    def look(self, block: Block, length: int, clock: Clock) -> Look:
        if clock.block == 0:
            return _refresh(block, length)
        return Look(block.start, length, length, voters=(block.start, block.stop))


@dataclass(frozen=True)
class Dual:
    """The whole row on entering a block, then the block and what is near it.

    Keys of everything else are kept as they are. Without a neighbourhood this is Fast-dLLM's dual
    cache, with one dInfer's vicinity. The row's first ``warmup`` forwards are uncached.
    """

    before: Whole = 0
    after: Whole = 0
    warmup: Whole = 0
    aligned: bool = False

    __post_init__ = check_options

    @property
    def terms(self) -> Terms:
        return Terms(self.aligned)

    def look(self, block: Block, length: int, clock: Clock) -> Look:
        if clock.row < self.warmup:
            return Look(0, length, length, voters=(block.start, block.stop), cached=False)
        if clock.row == max(self.warmup, clock.entered):
            return _refresh(block, length)
        near = (max(0, block.start - self.before), min(length, block.stop + self.after))
        return Look(*near, length, voters=near)


@dataclass(frozen=True)
class BlockCausal:
    """A block sees what is before it and itself: kept keys are exact (LLaDA2, SDAR).

    The prompt's whole blocks are prefilled; a finished block is computed once more, unmasked, so
    that later blocks see its keys (counted apart).
    """

    @property
    def terms(self) -> Terms:
        return Terms(aligned=True, whole=True, stores=True)

    def look(self, block: Block, length: int, clock: Clock) -> Look:
        return Look(block.start, block.stop, block.stop, voters=(block.start, block.stop))


@dataclass(frozen=True)
class BlockCausalUncached:
    """The same attention, with everything up to the block computed every time (official LLaDA2)."""

    @property
    def terms(self) -> Terms:
        return Terms(aligned=True, whole=True)

    def look(self, block: Block, length: int, clock: Clock) -> Look:
        here = (block.start, block.stop)
        return Look(0, block.stop, block.stop, voters=here, causal=block.width, cached=False)


@dataclass(frozen=True)
class Unroll:
    """Ask less often whether a block is finished (dInfer).

    Up to ``most`` rounds are made at once, one per ``tokens`` masks, and never fewer than
    ``least``; a round that begins with a refresh looks twice. Forwards after the last mask change
    no token, but they count.
    """

    most: Count = 4
    tokens: Count = 8
    least: Count = 1

    __post_init__ = check_options

    def rounds(self, masked: int) -> int:
        return max(self.least, min(masked // self.tokens, self.most))


@dataclass(frozen=True)
class Plan:
    """Every window of a row, in order, as far as tokens do not decide it."""

    gaze: Gaze
    unroll: Unroll | None = None

    def blocks(self, prompt: int, new: int, width: int) -> tuple[Block, ...]:
        """The blocks to fill, in order; the last one's ``stop`` is the canvas's length."""
        terms = self.gaze.terms
        return lay_out(prompt, new, width, aligned=terms.aligned, whole=terms.whole)

    def prefill(self, first: Block) -> tuple[Look, ...]:
        """What is computed before the first block."""
        if not self.gaze.terms.stores or first.start == 0:
            return ()
        here = (0, first.start)
        return (Look(*here, first.start, "prefill", here, causal=first.width),)

    def look(self, block: Block, length: int, clock: Clock) -> Look:
        """The next denoising forward of a block on a canvas of this length."""
        if self.unroll and _refreshed_late(self.gaze, block, clock):
            return _refresh(block, length)
        return self.gaze.look(block, length, clock)

    def patience(self, block: Block, length: int, clock: Clock, masked: int) -> int:
        """Denoising forwards to make before asking again whether the block is finished."""
        if self.unroll is None:
            return 1
        forwards = 0
        for _ in range(self.unroll.rounds(masked)):
            at = Clock(clock.row + forwards, clock.block + forwards)
            forwards += 2 if self.look(block, length, at).kind == "refresh" else 1
        return forwards

    def commit(self, block: Block) -> tuple[Look, ...]:
        """What is computed after a block, before the next one."""
        here = (block.start, block.stop)
        return (Look(*here, block.stop, "commit", here),) if self.gaze.terms.stores else ()

    def __str__(self) -> str:
        told = spelled(self.gaze, PLANS)
        return told if self.unroll is None else f"{told}+{spelled(self.unroll, AROUND)}"


def parse_plan(text: str) -> Plan:
    """``dual:before=16,after=16`` or ``prefix+unroll:most=4,tokens=8`` -> the plan it spells."""
    first, *rest = text.split("+")
    if len(rest) > 1:
        raise CoterieError(f"a plan has at most one addition, not {len(rest)}: {text!r}")
    unroll = parse(rest[0], AROUND, "addition to a plan") if rest else None
    return Plan(parse(first, PLANS, "plan"), unroll)


def _refresh(block: Block, length: int) -> Look:
    return Look(0, length, length, "refresh", (block.start, block.stop))


def _refreshed_late(gaze: Gaze, block: Block, clock: Clock) -> bool:
    """dInfer notes the block of its cache one round late where warm-up ends in a later block."""
    if not isinstance(gaze, Dual) or gaze.warmup == 0 or block.index == 0:
        return False
    return clock.entered <= gaze.warmup and clock.row == gaze.warmup + 2


PLANS: dict[str, type[Gaze]] = {
    "uncached": Uncached,
    "prefix": Prefix,
    "dual": Dual,
    "block-causal": BlockCausal,
    "block-causal-uncached": BlockCausalUncached,
}
AROUND = {"unroll": Unroll}
