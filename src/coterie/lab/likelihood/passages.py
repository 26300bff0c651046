"""Passages from text: pieces of a long one, or a continuation after its context."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from coterie.engine.engine import Engine
from coterie.errors import TaskError
from coterie.lab.likelihood.estimator import Passage
from coterie.loading.load import Model
from coterie.tokenizer.tokenizer import SubwordTokenizer

PASSAGE_TOKENS, PASSAGE_BLOCKS = 256, 2  # the larger one sets the length of a passage


def split_text(name: str, text: str, engine: Engine) -> Iterator[Passage]:
    """The passages of a text, each after the tokens with which the tokenizer starts every text.

    Raises TaskError where the tokenizer loses a character.
    """
    model, block = engine.model, engine.generation.block
    ids, ends = _encode(model, text)
    first = model.tokenizer.encode("", raw=True)
    length = min(max(PASSAGE_TOKENS, PASSAGE_BLOCKS * block), model.spec.max_length)
    length = max(1, (length - len(first)) // block * block)
    for number, start in enumerate(range(0, len(ids), length)):
        stop = min(start + length, len(ids))
        size = ends[stop - 1] - (ends[start - 1] if start else 0)
        yield Passage(f"{name}/{number}", (*first, *ids[start:stop]), len(first), size)


def _encode(model: Model, text: str) -> tuple[list[int], list[int]]:
    """The ids of a text, and how many of its bytes end with each token."""
    tokenizer = model.tokenizer
    if not isinstance(tokenizer, SubwordTokenizer):
        ids = tokenizer.encode(text, raw=True)
        return ids, list(range(1, len(ids) + 1))
    encoding = tokenizer.tokenizer.encode(text, add_special_tokens=False)
    decoded = unicodedata.normalize("NFC", tokenizer.decode(encoding.ids))
    expected = unicodedata.normalize("NFC", text)
    if decoded != expected:
        pairs = enumerate(zip(decoded, expected, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(decoded), len(expected)))
        line, part = expected.count("\n", 0, place) + 1, expected[place : place + 20]
        raise TaskError(f"line {line}: the model's tokenizer cannot encode {part!r}")
    bytes_before = [0]
    for character in text:
        bytes_before.append(bytes_before[-1] + len(character.encode()))
    return encoding.ids, [bytes_before[stop] for _, stop in encoding.offsets]


def continuation_passage(
    name: str, engine: Engine, context: str, continuation: str, *, templated: bool = False
) -> Passage:
    """The tokens of a continuation after those of its context.

    A context that is too long loses its beginning. With ``templated`` it has every special token
    already. Spaces between the two belong to the continuation, as a tokenizer joins them to words.
    """
    tokenizer, block = engine.model.tokenizer, engine.generation.block
    size = len(continuation.encode())
    cut = len(context.rstrip(" "))
    context, continuation = context[:cut], context[cut:] + continuation
    if templated and isinstance(tokenizer, SubwordTokenizer):
        before, ids = (
            tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
            for text in (context, context + continuation)
        )
    else:
        before, ids = (
            tokenizer.encode(text, raw=True) for text in (context, context + continuation)
        )
    given = min(len(before), len(ids) - 1)
    # Whole blocks have to fit, and the first one may start in the middle.
    surplus = max(0, len(ids) - max(1, engine.model.spec.max_length - block))
    return Passage(name, tuple(ids[surplus:]), max(0, given - surplus), size)
