"""Multiple choice by likelihood, with rows as ARC, HellaSwag and MMLU have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from coterie.errors import TaskError
from coterie.lab.evals.task import QUESTION, Grade, Item, Task, TaskOptions
from coterie.lab.evals.tasks.source import BenchmarkFile, read_benchmark

NAME, LETTERS = "choices", "ABCDEFGHIJ"
FORMS = (
    "rows of ARC (question, choices.text, choices.label, answerKey), HellaSwag (ctx, endings, "
    "label) or MMLU (question, choices, answer)"
)


def open_choices(options: TaskOptions) -> Task:
    """Each row of a file; the answer is the continuation with the greatest likelihood.

    An MMLU question lists its choices, and their letters are compared; otherwise their texts are.
    """
    options.require_zero_shot(NAME)
    if options.data is None:
        raise TaskError(f"{NAME} needs `data`: a file with {FORMS}")
    data = read_benchmark(BenchmarkFile(f"{NAME}.jsonl", NAME, (), {}), options.data)
    items = []
    for number, row in enumerate(data.rows):
        try:
            context, texts, right = _read_row(row)
            if not (0 <= right < len(texts) <= len(LETTERS)):
                raise ValueError("its answer is none of its choices")
        except (KeyError, TypeError, ValueError) as error:
            raise TaskError(f"{data.name}, row {number + 1}: {error}; expected {FORMS}") from None
        gold = json.dumps({"choices": texts, "right": right})
        items.append(Item(f"{NAME}/{number}", context, gold))
    about = {"shots": 0, "counts": "greatest likelihood", "samples": options.samples}
    return Task(
        NAME, tuple(items), QUESTION, grade_letter, {**about, **data.settings()},
        max_new_tokens=1, samples=options.samples,
    )  # fmt: skip


def grade_letter(output: str, item: Item) -> Grade:
    """Grades an answer that names a choice by its letter."""
    letter = output.strip()[:1]
    return Grade(letter == LETTERS[json.loads(item.gold)["right"]], letter or None)


def choice_texts(item: Item) -> tuple[str, ...]:
    """The continuations to compare."""
    return tuple(json.loads(item.gold)["choices"])


def _read_row(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """The context, the continuations and the index of the right one."""
    if "endings" in row:
        return row["ctx"], [f" {text}" for text in row["endings"]], int(row["label"])
    choices = row["choices"]
    if isinstance(choices, Mapping):
        texts = [f" {text}" for text in choices["text"]]
        right = choices["label"].index(row["answerKey"])
        return f"Question: {row['question']}\nAnswer:", texts, right
    letters, answer = LETTERS[: len(choices)], row["answer"]
    listed = [f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True)]
    right = LETTERS.index(answer) if isinstance(answer, str) else int(answer)
    context = "\n".join([row["question"], *listed, "Answer:"])
    return context, [f" {letter}" for letter in letters], right
