"""The text of an answer: released in order, once, and up to the first stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.decoding import Token
from coterie.engine.events import Denoised
from coterie.server.answer import MAX_STEPS, AnswerStream, Delta, Step

TEXT = st.text("abé", max_size=30)
STOPS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces."""
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


def released(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stream = AnswerStream(stops)
    deltas = [stream.push(piece) for piece in pieces]
    return "".join(delta.text for delta in [*deltas, stream.finish()]), stream.stopped


def expected(text: str, stops: list[str]) -> str:
    """Character by character: the first stop string that is complete ends the answer."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(TEXT, STOPS, st.lists(st.integers(0, 30)))
def test_pieces_do_not_matter(text: str, stops: list[str], places: list[int]) -> None:
    answer, stopped = released(cut(text, places), stops)
    assert answer == expected(text, stops)
    assert stopped == any(stop in text for stop in stops)


@given(TEXT, STOPS, st.lists(st.integers(0, 30)))
def test_no_part_of_a_stop_string_is_ever_released(
    text: str, stops: list[str], places: list[int]
) -> None:
    stream, sent, final = AnswerStream(stops), "", expected(text, stops)
    for piece in cut(text, places):
        sent += stream.push(piece).text
        assert final.startswith(sent)
    assert sent + stream.finish().text == final


def test_text_without_a_stop_string_is_not_held_back() -> None:
    stream = AnswerStream(["\n\n"])
    assert stream.push("one\n").text == "one"
    assert stream.push("two").text == "\ntwo"


def tokens_of(text: str) -> list[Token]:
    return [Token(position, ord(letter), 0.5) for position, letter in enumerate(text)]


def letters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@given(st.text("ab", min_size=1, max_size=20), STOPS, st.lists(st.integers(0, 20)))
def test_tokens_go_with_their_text(text: str, stops: list[str], places: list[int]) -> None:
    stream, tokens, sent = AnswerStream(stops), tokens_of(text), Delta()
    for piece in cut(text, places):
        first, tokens = tokens[: len(piece)], tokens[len(piece) :]
        sent = sent.joined(stream.push(piece, first))
    if stream.stopped:
        count, rest = stream.tokens_before_stop([ord(letter) for letter in text], letters)
        assert count == len(sent.text)
        sent = sent.joined(rest)
    else:
        sent = sent.joined(stream.finish())
    assert [token.position for token in sent.tokens] == list(range(len(sent.text)))


POSITIONS = st.sets(st.integers(0, 7), max_size=4)


@given(st.lists(st.tuples(POSITIONS, POSITIONS), min_size=1, max_size=3 * MAX_STEPS))
def test_a_slow_reader_sees_the_same_canvas(changes: list[tuple[set[int], set[int]]]) -> None:
    """However many steps become one, the writes leave the same tokens."""
    events = [
        Denoised(
            0,
            forward=number,
            text=str(number),
            committed=tuple(Token(p, number, 0.5) for p in sorted(written)),
            remasked=tuple(sorted(masked - written)),
        )
        for number, (written, masked) in enumerate(changes)
    ]
    delta = Delta()
    for event in events:
        delta = delta.joined(Delta(steps=(Step(event),)))
    merged = [step.event for step in delta.steps]
    assert len(merged) == min(len(events), MAX_STEPS)
    assert canvas(merged) == canvas(events)
    assert "".join(event.text for event in merged) == "".join(event.text for event in events)


def canvas(events: list[Denoised]) -> dict[int, int]:
    tokens: dict[int, int] = {}
    for event in events:
        for position in event.remasked:
            tokens.pop(position, None)
        tokens |= {token.position: token.id for token in (*event.committed, *event.edited)}
    return tokens


@pytest.mark.parametrize("stops", [[], ["x"]])
def test_an_empty_answer_is_empty(stops: list[str]) -> None:
    assert released([], stops) == ("", False)
