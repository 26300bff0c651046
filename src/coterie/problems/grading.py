r"""Grades an output: ``#### n``, ``\boxed{n}``, or a function that is run against its asserts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings

from coterie.problems.problem import Problem

SECONDS = 5  # of processor time, and of the wall clock twice that
LIMITS = (
    ("RLIMIT_CPU", SECONDS),
    ("RLIMIT_AS", 512 << 20),  # bytes
    ("RLIMIT_FSIZE", 0),
    ("RLIMIT_NPROC", 0),
    ("RLIMIT_CORE", 0),
)

BUILTINS = ("len", "max", "min", "range", "sum", "abs", "sorted", "reversed", "list", "int")
ATTRIBUTES = ("append", "insert", "reverse", "extend", "pop")
FORBIDDEN = (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.With, ast.Try, ast.ClassDef)

RUNNER = """
import resource, sys
source = sys.stdin.read()
names = {{name: getattr(__builtins__, name) for name in {allowed!r}}}
for limit, most in {limits!r}:
    resource.setrlimit(getattr(resource, limit), (most, most))
exec(compile(source, "answer", "exec"), {{"__builtins__": names}})
sys.stdout.write("passed")
"""


def grade(problem: Problem, output: str) -> bool:
    """Whether ``output`` answers ``problem``; a wrong, endless or forbidden program is False."""
    if problem.task == "words":
        return _last(r"####\s*(-?\d+)", output) == problem.gold
    if problem.task == "algebra":
        return _last(r"\\boxed\{\s*(-?\d+)\s*\}", output) == problem.gold
    return runs(f"{output}\n{problem.gold}\n")


def runs(program: str) -> bool:
    """Whether a small program ends without an error, in a child that can reach nothing.

    Two fences: its syntax tree may name only a short list of builtins and list methods, and the
    child that runs it has limits on processor time, memory, files and processes.
    """
    if not harmless(program):
        return False
    command = [sys.executable, "-I", "-S", "-c", RUNNER.format(allowed=BUILTINS, limits=LIMITS)]
    try:
        done = subprocess.run(
            command,
            input=program,
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and done.stdout == "passed"


def harmless(program: str) -> bool:
    """Whether the syntax tree stays inside what these problems need."""
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_harmless_node(node) for node in ast.walk(tree))


def _harmless_node(node: ast.AST) -> bool:
    if isinstance(node, FORBIDDEN):
        return False
    if isinstance(node, ast.Attribute):
        return node.attr in ATTRIBUTES
    return not (isinstance(node, ast.Name) and node.id.startswith("__"))


def _last(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text)
    return found[-1] if found else None
