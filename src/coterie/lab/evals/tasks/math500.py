r"""MATH500: competition problems; an answer is a number, a formula, an interval or a text.

The 500 test problems of MATH (Hendrycks et al., arXiv 2103.03874) that PRM800K holds out (Lightman
et al., arXiv 2305.20050), zero-shot with a boxed answer. Answers are normalized in ``latex`` and
compared by math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from coterie.lab.evals.task import Grade, Item, Task, TaskOptions
from coterie.lab.evals.tasks.boxed import (
    ANSWER_LINE_START,
    ZERO_SHOT,
    Box,
    find_boxes,
    strip_end_marks,
)
from coterie.lab.evals.tasks.latex import is_equivalent
from coterie.lab.evals.tasks.source import BenchmarkFile, read_benchmark
from coterie.lab.evals.tasks.verify import require_math_verify

TEST = BenchmarkFile(
    "math500/test.jsonl",
    "HuggingFaceH4/MATH-500",
    ("test.jsonl",),
    {"problem": str, "answer": str, "unique_id": str},
    unique_key="unique_id",
)
MAX_NEW_TOKENS = {"llada-moe": 1024}  # dInfer's; other families: 2048

FENCE = re.compile(r"^[ \t]*```[^\n]*$", re.MULTILINE)
MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$((?:[^$\n\\]|\\.)+?)\$", re.DOTALL
)
ANSWER_PHRASE = re.compile(
    rf"(?:{ANSWER_LINE_START}[ \t*_]*:|"
    r"\banswer\b[^.\n:=]{0,80}?\b(?:is|are|equals)\b[ \t*_]*:?)[\s*_`]*",
    re.IGNORECASE | re.MULTILINE,
)
ANSWER_TAG = re.compile(r"<answer>(.+?)</answer>", re.DOTALL | re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|$)|\n")
BETWEEN_BOXES = re.compile(
    r"[\s$.,;]*(?:(?:and|or|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|[a-zA-Z](?:_\w)?\s*=)[\s$.,;]*)*"
)
MAX_TAIL = 10_000  # characters read of an output without a box
ANSWER_LINE = re.compile(r"\W*(?:[a-zA-Z]\s*=\s*)?[-\d.,/\\$]+(?:\s*[a-z]+)?\W*")
NUMBER = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def open_math500(options: TaskOptions) -> Task:
    """Raises TaskError if math-verify is not installed."""
    options.require_zero_shot("math500")
    require_math_verify()
    source = read_benchmark(TEST, options.data)
    questions = (
        Item(f"math500/{row['unique_id']}", str(row["problem"]), str(row["answer"]))
        for row in source.rows
    )
    counts = "the last closed box, else the answer as said; compared by math-verify"
    about = {**source.settings(), "shots": 0, "counts": counts}
    return Task(
        "math500",
        tuple(questions),
        ZERO_SHOT,
        lambda output, item: grade(output, item.gold),
        about,
        MAX_NEW_TOKENS.get(options.family, 2048),
    )


def grade(output: str, gold: str) -> Grade:
    """Grades an output; ``gold`` is the bare answer, or a solution that ends in its box."""
    text = strip_end_marks(output)
    gold_boxes = find_boxes(gold)
    expected = gold_boxes[-1].content if gold_boxes else gold
    candidates = list(_candidates(text))
    for candidate in candidates:
        if is_equivalent(candidate, expected):
            return Grade(True, candidate)
    return Grade(False, candidates[0] if candidates else None)


def _candidates(text: str) -> Iterator[str]:
    """The answer; then, for several adjacent boxes, all of them as one list."""
    boxed = find_boxes(text)
    if boxed:
        yield boxed[-1].content
        adjacent = _adjacent_boxes(text, boxed)
        if len(adjacent) > 1:
            yield ", ".join(box.content for box in adjacent)
        return
    unboxed = _unboxed_answer(FENCE.sub("", text).strip()[-MAX_TAIL:])
    if unboxed:
        yield unboxed


def _adjacent_boxes(text: str, boxed: Sequence[Box]) -> list[Box]:
    """The last boxes with only commas, "and" or "or" between them."""
    adjacent = [boxed[-1]]
    for box in reversed(boxed[:-1]):
        if not BETWEEN_BOXES.fullmatch(text, box.stop, max(box.stop, adjacent[0].start)):
            break
        adjacent.insert(0, box)
    return adjacent


def _unboxed_answer(text: str) -> str | None:
    """The text after "the answer is", a text of one line, the last formula, or the last number."""
    tags = ANSWER_TAG.findall(text)
    if tags:
        return tags[-1].strip().strip("$")
    for phrase in reversed(list(ANSWER_PHRASE.finditer(text))):
        rest = text[phrase.end() :]
        formula = MATH.match(rest)
        if formula is not None:
            return _formula_content(formula)
        end = SENTENCE_END.search(rest)
        sentence = (rest if end is None else rest[: end.start()]).strip(" *_`")
        if sentence:
            inner = MATH.search(sentence)
            return sentence if inner is None else _formula_content(inner)
    first, _, last = text.rpartition("\n")
    # The last line of a longer text is an answer unless it is prose.
    short = (not first or ANSWER_LINE.fullmatch(last)) and not SENTENCE_END.search(last[:-1])
    if short and last and not MATH.search(last):
        return last.strip("`* ")
    formulas = list(MATH.finditer(text))
    if formulas:
        return _formula_content(formulas[-1])
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _formula_content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()
