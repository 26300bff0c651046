"""The text of one answer on its way to a client: what may be sent, and where it ends."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from coterie.decoding import Token
from coterie.engine.events import Denoised
from coterie.offload.traffic import Traffic
from coterie.server.votes import StepVotes

MAX_STEPS = 32
"""Steps that a slow reader may have waiting; older ones become one."""


@dataclass(frozen=True)
class Step:
    """One denoising forward of a request, as a frame shows it."""

    event: Denoised
    votes: StepVotes | None = None
    traffic: Traffic | None = None  # of all requests, where experts are offloaded
    seconds: float = 0.0  # since the request got a row


@dataclass(frozen=True)
class Delta:
    """What became final, and the steps since the last delta."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    steps: tuple[Step, ...] = ()

    def joined(self, other: Delta) -> Delta:
        """Both, in order; no text is lost."""
        steps = self.steps + other.steps
        while len(steps) > MAX_STEPS:
            steps = (_merged(steps[0], steps[1]), *steps[2:])
        return Delta(self.text + other.text, self.tokens + other.tokens, steps)


class AnswerStream:
    """Releases final text, in order and once, up to the first stop string.

    Text that could be the start of a stop string is held back. The stop string that is complete
    first ends the answer, so that the way in which text arrives does not matter.
    """

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self._released = self._pushed = 0  # characters
        self._tokens: list[tuple[int, Token]] = []  # not released: end of its text, token
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters that have been released."""
        return self._released

    def push(self, text: str, tokens: Sequence[Token] = ()) -> Delta:
        """What may be sent after text and tokens became final."""
        if self.stopped:
            return Delta()
        self._pushed += len(text)
        self._tokens += [(self._pushed, token) for token in tokens]
        self._held += text
        end = _first_stop(self._held, self._stop_strings)
        if end is not None:
            self.stopped = True
            return self._release(end)
        return self._release(len(self._held) - _held_back(self._held, self._stop_strings))

    def finish(self) -> Delta:
        """The text that was held back, unless a stop string has ended the answer."""
        if self.stopped:
            return Delta()
        return self._release(len(self._held))

    def tokens_before_stop(
        self, ids: Sequence[int], decode: Callable[[Sequence[int]], str]
    ) -> tuple[int, Delta]:
        """How many of the answer's ids make the text that was sent, and those not yet sent."""
        count = bisect_left(range(len(ids) + 1), self._released, key=lambda n: len(decode(ids[:n])))
        tokens = tuple(token for _, token in self._tokens if token.position < count)
        self._tokens = []
        return count, Delta(tokens=tokens)

    def _release(self, count: int) -> Delta:
        text, self._held = self._held[:count], self._held[count:]
        self._released += count
        tokens: list[Token] = []
        while self._tokens and self._tokens[0][0] <= self._released:
            tokens.append(self._tokens.pop(0)[1])
        return Delta(text, tuple(tokens))


def _first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the stop string starts that is complete first; of several, the longest."""
    starts = [(text.find(stop), len(stop)) for stop in stop_strings]
    ends = [(start + length, start) for start, length in starts if start >= 0]
    return min(ends)[1] if ends else None


def _held_back(text: str, stop_strings: Sequence[str]) -> int:
    """The length of the longest end of the text that starts a stop string."""
    longest = max(map(len, stop_strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0


def _merged(first: Step, second: Step) -> Step:
    """Two steps as one: the later one, with what both wrote."""
    a, b = first.event, second.event
    written = {token.position: token for token in (*a.committed, *a.edited)}
    later = {token.position for token in (*b.committed, *b.edited)} | set(b.remasked)
    earlier = tuple(token for position, token in written.items() if position not in later)
    remasked = {*a.remasked} - later - {token.position for token in earlier}
    event = replace(
        b,
        text=a.text + b.text,
        committed=(*earlier, *b.committed),
        remasked=tuple(sorted({*b.remasked, *remasked})),
    )
    return replace(second, event=event)
