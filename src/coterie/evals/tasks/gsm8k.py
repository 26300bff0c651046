"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al., arXiv 2110.14168).

What counts is what a reader takes for the answer. The two measures of lm-evaluation-harness (and
dInfer, which uses it) are recorded beside: ``strict``, the number after the first ``####``, and
``flexible``, the last number of all. They can be wrong where the answer is right: the one when the
prompt asked for a box, the other when a sentence follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

from coterie.evals.task import Grade, Item, Wish
from coterie.evals.tasks.boxes import answered, boxes
from coterie.evals.tasks.numbers import Number, grouped, numbers, plain
from coterie.evals.tasks.source import Published, Source, read
from coterie.naming import CoterieError

KEYS = {"question": str, "answer": str}
TEST, TRAIN = (
    Published(
        f"gsm8k/{split}.jsonl", "openai/gsm8k", (f"main/{split}-00000-of-00001.parquet",), KEYS
    )
    for split in ("test", "train")
)
SHOTS = {"llada-moe": 4}  # as dInfer asks it; families that are not named: none
LONGEST = {"llada-moe": 1024}  # tokens, as dInfer lets it write; others: 2048

ASKED = "Question: {question}\nLet's think step by step\nAnswer:"
ZERO_SHOT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."

GOLD = re.compile(r"####\s*(\S[^\n]*)")
BOLD = re.compile(r"\*\*([^\w*\n]{0,4}\d[\d,./ ]*[A-Za-z %/]{0,40}[.!]?)\*\*")
DIGIT = re.compile(r"\d")
TAGGED = re.compile(r"<answer>([^<>]*)</answer>", re.IGNORECASE)
BARE_NEXT = re.compile(r"^Question:", re.MULTILINE)
LONGEST_SENTENCE = 500  # characters after "the answer is" that are looked at
ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # the data's own calculator: "2*3=<<2*3=6>>6"

NEXT = re.compile(r"^[ \t>*#]*(?:Question|Problem|Q)[ \t*]*\d*[ \t*]*:", re.MULTILINE)
# Not a heading such as "#### 1. Find the cost" or "#### Step 1".
HASHES = re.compile(r"####[ \t*_=(]*(?!\d+[.)][ \t]+\S)(?=\\?(?:US)?[-\u2212.$€£¥₹\d])")
PHRASE = re.compile(
    r"(?:^[ \t>*_#]*(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|my)\s+)?(?:final\s+|correct\s+)?"
    r"answer[\s*_]*[:=]|\banswer\b[^.\n:=]{0,80}?\b(?:is|was|equals)\b[\s*_]*:?)"
    r"(?P<gap>[\s*_`$(\[]*(?:(?:therefore|thus|then|about|approximately|exactly|simply)[\s,*_]*)?)",
    re.IGNORECASE | re.MULTILINE,
)
SUMS = re.compile(r"(?:[\s\d.,+*/()$€£%-]*=)+\s*")  # "9 * 2 = "

HARNESS_STRICT = re.compile(r"#### (-?[0-9.,]+)")
HARNESS_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclass(frozen=True)
class Gsm8k:
    """The 1,319 test problems, asked after ``examples`` (of ``train``) or, without, for a box."""

    source: Source
    questions: tuple[Item, ...]
    family: str
    train: Source | None = None
    examples: tuple[Item, ...] = ()
    name: str = field(default="gsm8k", init=False)

    def settings(self) -> Mapping[str, object]:
        return {
            **self.source.settings(),
            "shots": len(self.examples),
            "examples": None if self.train is None else self.train.settings(),
            "template": ASKED if self.examples else ZERO_SHOT.format(question="{question}"),
            "counts": "the last box, <answer>, ####; else as said, in bold at the end, or the last",
            "also": {
                "strict": HARNESS_STRICT.pattern + " (first)",
                "flexible": HARNESS_FLEXIBLE.pattern + " (last)",
            },
        }

    def generation(self) -> Mapping[str, object]:
        return {"max_new_tokens": LONGEST.get(self.family, 2048)}

    def items(self) -> Sequence[Item]:
        return self.questions

    def prompt(self, item: Item) -> str:
        if not self.examples:
            return ZERO_SHOT.format(question=item.question)
        shown = [f"{ASKED.format(question=e.question)} {e.gold}" for e in self.examples]
        return "\n\n".join([*shown, ASKED.format(question=item.question)])

    def grade(self, output: str, item: Item) -> Grade:
        return grade(output, item.gold)


def open_gsm8k(wish: Wish) -> Gsm8k:
    """With as many examples as wished, or as is usual for the family."""
    source = read(TEST, wish.data)
    shots = SHOTS.get(wish.family, 0) if wish.shots is None else wish.shots
    train = _train(source.beside, shots) if shots else None
    examples = () if train is None else _examples(train, shots)
    return Gsm8k(source, tuple(_items(source)), wish.family, train, examples)


def grade(output: str, gold: str) -> Grade:
    """Compares as numbers; ``gold`` is the number, or the data's whole "... #### 1,234"."""
    right = gold_value(gold)
    text = answered(output)
    found = extract(_first_problem(text))
    until = text.partition("Question:")[0]  # where the harness stops generating
    return Grade(
        found is not None and right in (found.value, found.value * found.scale),
        None if found is None else found.text,
        {"strict": _strict(until) == right, "flexible": _flexible(until) == right},
    )


def gold_value(gold: str) -> Fraction:
    """The number that is right; raises CoterieError where ``gold`` holds none."""
    marked = GOLD.findall(gold)
    found = extract(marked[-1] if marked else gold)
    if found is None:
        raise CoterieError(f"{gold!r} holds no number; a gold answer is 1234 or '... #### 1,234'")
    return found.value * found.scale


def extract(text: str) -> Number | None:
    """The answer: the last box, ``<answer>`` or ``####`` that holds a number; else as said, as set
    in bold at the end, or the last of all."""
    bare = plain(text)
    return _marked(text) or _said(bare) or _bold(bare) or _last(bare)


def _train(folder: Path | None, shots: int) -> Source:
    """Where examples come from: beside the test problems, or the hub as these do."""
    if shots < 0:
        raise CoterieError(f"gsm8k: {shots} shots; 0 or more")
    beside = None if folder is None else folder / "train.jsonl"
    if beside is not None and not beside.is_file():
        raise CoterieError(
            f"{beside}: not there, and {shots} shots are taken from it; or --shots 0"
        )
    return read(TRAIN, beside)


def _examples(train: Source, shots: int) -> tuple[Item, ...]:
    """The first ones, without the calculator's annotations."""
    if len(train.rows) < shots:
        raise CoterieError(f"{train.name} holds {len(train.rows)} examples, not {shots}")
    return tuple(
        Item(f"gsm8k/train/{n}", str(row["question"]), ANNOTATION.sub("", str(row["answer"])))
        for n, row in enumerate(train.rows[:shots])
    )


def _items(source: Source) -> Iterator[Item]:
    for number, row in enumerate(source.rows):
        try:
            gold_value(str(row["answer"]))
        except CoterieError as error:
            raise CoterieError(f"{source.name}, row {number + 1}: {error}") from None
        yield Item(f"gsm8k/{number}", str(row["question"]), str(row["answer"]))


def _first_problem(text: str) -> str:
    """Up to where a model that saw examples goes on to the next problem."""
    for start in islice(NEXT.finditer(text), 20):
        before = text[: start.start()]
        if _marked(before) or _said(plain(before)):
            return before
    # A heading "Question" is no next problem; without an answer before it, only the bare word is.
    digit = DIGIT.search(text)
    bare = None if digit is None else BARE_NEXT.search(text, digit.end())
    return text if bare is None else text[: bare.start()]


def _marked(text: str) -> Number | None:
    """From the last box, tag or ``####`` that holds a number, wherever it stands."""
    places = [(box.start, box.content) for box in boxes(text)]
    places += [(tagged.start(), tagged[1]) for tagged in TAGGED.finditer(text)]
    for hashes in HASHES.finditer(text):
        places.append((hashes.start(), text[hashes.end() :].split("\n", 1)[0]))
    for _, content in sorted(places, reverse=True):
        found = _result(grouped(plain(content)))
        if found is not None:
            return found
    return None


def _said(text: str) -> Number | None:
    """After the last "the answer is" or "Answer:" that a number follows at once."""
    for phrase in reversed(list(PHRASE.finditer(text))):
        rest = text[phrase.end("gap") : phrase.end("gap") + LONGEST_SENTENCE]
        first = next(numbers(rest), None)
        if first is not None and not rest[: first.start].strip(" -$€£¥₹"):
            sums = SUMS.match(rest, first.start)
            return first if sums is None else next(numbers(rest[sums.end() :]), first)
    return None


def _result(text: str) -> Number | None:
    """Of "9 * 2 = 18 dollars" the 18, of "42 apples in 3 bags" the 42."""
    after = next(numbers(text.rpartition("=")[2]), None)
    return after or next(numbers(text), None)


def _bold(text: str) -> Number | None:
    """The last number set in bold, alone or with its unit, after which nothing is worked out."""
    *_, last = (None, *BOLD.finditer(text))
    if last is None or "=" in text[last.end() :]:
        return None
    return _result(last[1])


def _last(text: str) -> Number | None:
    *_, last = (None, *numbers(text))
    return last


def _strict(text: str) -> Fraction | None:
    found = HARNESS_STRICT.search(text)
    return None if found is None else _as_harness(found[1])


def _flexible(text: str) -> Fraction | None:
    found = HARNESS_FLEXIBLE.findall(text)
    return _as_harness(found[-1]) if found else None


def _as_harness(written: str) -> Fraction | None:
    """Less what the harness ignores: commas, dollars, one full stop at the end."""
    try:
        return Fraction(written.replace(",", "").replace("$", "").removesuffix("."))
    except (ValueError, ZeroDivisionError):
        return None
