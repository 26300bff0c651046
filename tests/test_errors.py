"""Messages are one short line that no terminal obeys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import CLIP_CHARACTERS, CoterieError, clip, printable, quote, shorten

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(text=st.text(st.characters(exclude_categories=())))
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    for shown in (printable(text), str(CoterieError(text))):
        assert all(ord(character) >= 32 or character in "\n\t" for character in shown)
        assert not {"\x1b", "\x07", "\x7f", "\x9b", "\u202e", "\ud800"} & set(shown)
        shown.encode("utf-8")


@given(text=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"])))
def test_ordinary_text_stays(text: str) -> None:
    assert printable(f"{text}\n\t") == f"{text}\n\t"


@given(value=VALUES, repeats=st.integers(1, 2000))
def test_a_quoted_value_is_short(value: object, repeats: int) -> None:
    for shown in (value, [value] * repeats, {"k" * repeats: value}, "9" * repeats):
        assert len(quote(shown)) <= CLIP_CHARACTERS
        assert len(clip(str(shown))) <= CLIP_CHARACTERS


def test_a_value_nested_without_end_is_short() -> None:
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert len(quote(value)) <= CLIP_CHARACTERS
    while value:  # freeing it at once would recurse
        value = value.pop()


def test_a_message_is_never_longer_than_a_screen() -> None:
    assert len(str(CoterieError("x" * 10**7))) <= 4000


@given(
    text=st.text(st.characters(categories=["L", "Zs"]), min_size=CLIP_CHARACTERS),
    before=st.sampled_from(["", "the model's ", "'a' and "]),
)
def test_a_message_does_not_repeat_a_long_quotation(text: str, before: str) -> None:
    message = shorten(f"{before}name {text!r}: unknown; use 'b'")
    assert message.startswith(f"{before}name '{text[:20]}")
    assert message.endswith("': unknown; use 'b'")
    assert len(message) <= CLIP_CHARACTERS + 40


@given(text=st.text(st.characters(categories=["L", "Zs"]), max_size=CLIP_CHARACTERS))
def test_a_short_quotation_stays(text: str) -> None:
    message = f"the models' own {text!r} is no {text!r}, as 'a' says"
    assert shorten(message) == message


def test_a_value_has_the_words_of_json() -> None:
    values = {"null": None, "true": True, "[null, false]": [None, False]}
    assert [quote(value) for value in values.values()] == list(values)
