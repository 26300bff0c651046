r"""Where an output ends, and the ``\boxed{...}`` in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
UNBRACED = re.compile(r"[^\s{}$\\,;]+")  # of "\boxed 5"
# A chat model's own end marks: published tokenizers spell them so.
END_OF_TEXT = re.compile(r"</s>|<\|(?:im_end|endoftext|eot_id|end|role_end)\|>")
BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace opens nothing


@dataclass(frozen=True)
class Box:
    """``content`` stood in a box over ``start .. stop`` of the text."""

    start: int
    stop: int
    content: str


def strip_end_marks(output: str) -> str:
    """The output up to its end mark."""
    end = END_OF_TEXT.search(output)
    return output if end is None else output[: end.start()]


def find_boxes(text: str) -> list[Box]:
    """Every box that is closed and not empty, by where it begins; of nested ones, all."""
    boxes: list[Box] = []
    closing_braces = _match_braces(text)
    for opening in BOX.finditer(text):
        start = opening.end()
        if text.startswith("{", start):
            stop = closing_braces.get(start)
            content = "" if stop is None else text[start + 1 : stop]
        else:
            unbraced = UNBRACED.match(text, start)
            stop = start if unbraced is None else unbraced.end() - 1
            content = "" if unbraced is None else unbraced[0].rstrip(".")
        if stop is not None and content.strip():
            boxes.append(Box(opening.start(), stop + 1, content.strip()))
    return boxes


def _match_braces(text: str) -> dict[int, int]:
    """From every opening brace to its closing one, in one pass: outputs may hold thousands."""
    stack: list[int] = []
    pairs: dict[int, int] = {}
    for token in BRACE_OR_ESCAPE.finditer(text):
        if token[0] == "{":
            stack.append(token.start())
        elif token[0] == "}" and stack:
            pairs[stack.pop()] = token.start()
    return pairs
