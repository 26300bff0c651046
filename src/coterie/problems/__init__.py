"""The four kinds of small problems that the embedded model solves."""

from coterie.problems.algebra import algebra_problem
from coterie.problems.code import docstring_problem, phrase, sentence_problem
from coterie.problems.facts import LARGEST, fact, with_other_facts
from coterie.problems.problem import Maker, Problem, Split, draw, split_of
from coterie.problems.words import taught_word_problem, word_problem

TASKS: dict[str, Maker] = {
    "words": word_problem,
    "docstring": docstring_problem,
    "sentence": sentence_problem,
    "algebra": algebra_problem,
}
TAUGHT: dict[str, Maker] = {**TASKS, "words": taught_word_problem}  # what training draws from

__all__ = [
    "LARGEST",
    "TASKS",
    "TAUGHT",
    "Maker",
    "Problem",
    "Split",
    "draw",
    "fact",
    "phrase",
    "split_of",
    "with_other_facts",
]
