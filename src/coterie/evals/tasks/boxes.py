r"""Where an output ends, and the ``\boxed{...}`` in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
BARE = re.compile(r"[^\s{}$\\,;]+")  # of "\boxed 5"
# A chat model's own end marks: published tokenizers spell them so.
END = re.compile(r"</s>|<\|(?:im_end|endoftext|eot_id|end|role_end)\|>")
STEP = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace opens nothing


@dataclass(frozen=True)
class Box:
    """``content`` stood in a box over ``start .. stop`` of the text."""

    start: int
    stop: int
    content: str


def answered(output: str) -> str:
    """The output up to its end mark."""
    end = END.search(output)
    return output if end is None else output[: end.start()]


def boxes(text: str) -> list[Box]:
    """Every box that is closed and not empty, by where it begins; of nested ones, all."""
    found: list[Box] = []
    closing = _closing(text)
    for opened in BOX.finditer(text):
        start = opened.end()
        if text.startswith("{", start):
            stop = closing.get(start)
            content = "" if stop is None else text[start + 1 : stop]
        else:
            bare = BARE.match(text, start)
            stop = start if bare is None else bare.end() - 1
            content = "" if bare is None else bare[0].rstrip(".")
        if stop is not None and content.strip():
            found.append(Box(opened.start(), stop + 1, content.strip()))
    return found


def _closing(text: str) -> dict[int, int]:
    """From every opening brace to its closing one, in one pass: outputs may hold thousands."""
    open_: list[int] = []
    pairs: dict[int, int] = {}
    for step in STEP.finditer(text):
        if step[0] == "{":
            open_.append(step.start())
        elif step[0] == "}" and open_:
            pairs[open_.pop()] = step.start()
    return pairs
