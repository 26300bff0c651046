"""The four tasks of the embedded model: small generated problems."""

from coterie.lab.problems.algebra import algebra_problem
from coterie.lab.problems.code import code_phrase, docstring_problem, sentence_problem
from coterie.lab.problems.facts import MAX_NUMBER, draw_equation, replace_equations
from coterie.lab.problems.problem import Problem, ProblemMaker, Split, draw_problem, split_of
from coterie.lab.problems.words import training_word_problem, word_problem

PROBLEM_MAKERS: dict[str, ProblemMaker] = {
    "words": word_problem,
    "docstring": docstring_problem,
    "sentence": sentence_problem,
    "algebra": algebra_problem,
}
TRAINING_MAKERS: dict[str, ProblemMaker] = {**PROBLEM_MAKERS, "words": training_word_problem}

__all__ = [
    "MAX_NUMBER",
    "PROBLEM_MAKERS",
    "TRAINING_MAKERS",
    "Problem",
    "ProblemMaker",
    "Split",
    "code_phrase",
    "draw_equation",
    "draw_problem",
    "replace_equations",
    "split_of",
]
