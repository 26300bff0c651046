"""The four kinds of small problems that the embedded model solves."""

from coterie.problems.algebra import algebra_problem
from coterie.problems.code import docstring_problem, code_phrase, sentence_problem
from coterie.problems.facts import MAX_NUMBER, draw_equation, replace_equations
from coterie.problems.problem import ProblemMaker, Problem, Split, draw_problem, split_of
from coterie.problems.words import training_word_problem, word_problem

PROBLEM_MAKERS: dict[str, ProblemMaker] = {
    "words": word_problem,
    "docstring": docstring_problem,
    "sentence": sentence_problem,
    "algebra": algebra_problem,
}
TRAINING_MAKERS: dict[str, ProblemMaker] = {
    **PROBLEM_MAKERS,
    "words": training_word_problem,
}  # what training draws from

__all__ = [
    "MAX_NUMBER",
    "PROBLEM_MAKERS",
    "TRAINING_MAKERS",
    "ProblemMaker",
    "Problem",
    "Split",
    "draw_problem",
    "draw_equation",
    "code_phrase",
    "split_of",
    "replace_equations",
]
