r"""Marks of an answer that tasks share: end marks, ``\boxed{...}``, "the answer is"."""

from __future__ import annotations

import re
from dataclasses import dataclass

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
UNBRACED = re.compile(r"[^\s{}$\\,;]+")  # the content of "\boxed 5"
# End marks of chat models, as published tokenizers spell them.
END_OF_TEXT = re.compile(r"</s>|<\|(?:im_end|endoftext|eot_id|end|role_end)\|>")
MAX_CUT_BOX = 200  # characters
BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no brace


# The start of a line "Final answer"; a colon or an equals sign follows.
ANSWER_LINE_START = (
    r"^[ \t>*_#]*(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|my)\s+)?"
    r"(?:final\s+|correct\s+)?answer"
)
ZERO_SHOT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Box:
    """A box with ``content`` at ``start .. stop`` of a text."""

    start: int
    stop: int
    content: str


def strip_end_marks(output: str) -> str:
    """The output before its end mark."""
    end = END_OF_TEXT.search(output)
    return output if end is None else output[: end.start()]


def find_boxes(text: str) -> list[Box]:
    """All non-empty boxes in order of their start, nested ones included.

    If there is none, the last box counts that is never closed because the output was cut.
    """
    boxes: list[Box] = []
    cut: list[Box] = []
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
        elif stop is None and (end := _end_of_cut_box(text, start)) is not None:
            cut = [Box(opening.start(), end, text[start + 1 : end].strip())]
    return boxes or cut


def _end_of_cut_box(text: str, start: int) -> int | None:
    """The end of a box that is open at the end of the text; None if another line follows."""
    if len(text) - start > MAX_CUT_BOX:
        return None
    content = text[start:].rstrip().rstrip("$").rstrip(".")
    is_content = content[:1] == "{" and content[1:].strip() and "\n" not in content
    return start + len(content) if is_content else None


def _match_braces(text: str) -> dict[int, int]:
    """The position of the closing brace of each opening one, in linear time."""
    stack: list[int] = []
    pairs: dict[int, int] = {}
    for token in BRACE_OR_ESCAPE.finditer(text):
        if token[0] == "{":
            stack.append(token.start())
        elif token[0] == "}" and stack:
            pairs[stack.pop()] = token.start()
    return pairs
