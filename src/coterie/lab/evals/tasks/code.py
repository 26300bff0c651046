"""Extracts a program from a model's output and runs its tests in the sandbox."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from threading import Lock

from coterie.lab.evals.task import Grade
from coterie.lab.evals.tasks.boxed import strip_end_marks
from coterie.lab.sandbox import run_program

PYTHON_LANGUAGES = ("", "python", "python3", "py", "py3", "python-repl", "pycon")
MAX_FENCE_LINE = 500  # characters; a longer line opens no fence
MAX_BLOCKS = 100  # the last ones are read
MAX_STARTS = 16  # places where unfenced code may begin
MAX_PARSED = 400_000  # characters parsed from them; a long text has fewer such places
MAX_TRIMS = 60  # cuts of a text at its next syntax error

FENCE_OPENING = re.compile(
    r"(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*\{?\.?(?P<language>[\w+-]*)[^`~]*$"
)
INLINE_CODE = re.compile(
    r"(?P<ticks>`{1,4})(?:python3?[ \t]|py[ \t])?(?P<code>[^`\n]+)(?P=ticks)(?!`)"
)
CODE_START = re.compile(
    r"(?:import|from|def|class|async def)\b|@|[A-Za-z_]\w*(?: *: *[\w\[\], ]+)? *=[^=]"
)
BODY_END = re.compile(r"^(?:def|class|@|if|print|assert|#|```|~~~|\[DONE\]|<)", re.MULTILINE)
FUTURE_IMPORT = re.compile(r"^from __future__ import .*$", re.MULTILINE)
UNUSUAL_SPACES = {0xA0: " ", 0xFEFF: None, 0x200B: None}  # hard and zero-width spaces
SESSION_PROMPT = re.compile(r"^(?:>>>|\.\.\.)(?: |$)", re.MULTILINE)
TEST_MODULES = ("doctest", "unittest")  # their calls at top level only test the answer

PARSE_LOCK = Lock()  # the warnings filter is global to the process

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class CodeBlock:
    """The content of a code fence; ``language`` is in lower case, empty if unknown."""

    code: str
    language: str


def grade(output: str, tests: str, *, header: str = "", trust: bool = False) -> Grade:
    """Runs the program in ``output``, then ``tests``; ``header`` as in ``extract_code``.

    Both get the imports and helpers of ``header``: the program cannot replace those of the tests.
    """
    functions = called_functions(tests)
    code = extract_code(output, functions, header)
    if code is None:
        return Grade(False, None)
    program, tests = (
        _future_first(f"{preamble(header, functions)}\n\n{part}") for part in (code, tests)
    )
    return Grade(run_program(program, tests, trust=trust).passed, code)


def extract_code(output: str, functions: Sequence[str], header: str = "") -> str | None:
    """The code that defines one of ``functions``, without demo code; None for a blank output.

    ``header`` is the code of the prompt: it is prepended to an output that is only a function body.
    Of several fences that define a function the last counts, with the definitions of earlier ones.
    If no code can be parsed, the last block or the whole text is returned.
    """
    answer = _answer_text(output)
    if not answer.strip():
        return None
    for text in dict.fromkeys([answer, answer.translate(UNUSUAL_SPACES).replace("\\_", "_")]):
        programs = chain(
            _whole_programs(text, functions), _completed_bodies(text, header, functions)
        )
        if (code := next(programs, None)) is not None:
            return code
    blocks = _find_blocks(answer)
    return blocks[-1].code if blocks else answer


def called_functions(tests: str) -> tuple[str, ...]:
    """The functions that ``tests`` call, without their own and the builtin ones.

    For HumanEval's form, ``check(name)``, the checked function.
    """
    tree = _parse(tests)
    if tree is None:
        return ()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    names = [(call.func.id, call) for call in calls if isinstance(call.func, ast.Name)]
    if _defines(tree, ["check"]):
        checked = [argument for name, call in names if name == "check" for argument in call.args]
        return tuple(argument.id for argument in checked if isinstance(argument, ast.Name))
    defined = {*dir(builtins), *(node.name for node in tree.body if isinstance(node, Function))}
    return tuple(dict.fromkeys(name for name, _ in names if name not in defined))


def preamble(header: str, functions: Sequence[str]) -> str:
    """The part of ``header`` above the function to write: imports and helper functions."""
    starts = [
        re.search(rf"^(?:async\s+)?def\s+{name}\b", header, re.MULTILINE) for name in functions
    ]
    positions = [start.start() for start in starts if start is not None]
    return header[: min(positions)].rstrip() if positions else ""


def _future_first(program: str) -> str:
    """Moves ``from __future__`` imports to the top, where Python requires them."""
    return "\n".join([*FUTURE_IMPORT.findall(program), FUTURE_IMPORT.sub("", program)])


def _answer_text(output: str) -> str:
    """The answer: after a thinking part, in ``[BEGIN]`` and ``[DONE]``, before an end mark."""
    text = strip_end_marks(output).replace("\r\n", "\n").rpartition("</think>")[2]
    before, marker, after = text.partition("[DONE]")[0].rpartition("[BEGIN]")
    text = (after if marker else before + after).strip("\n")
    stripped = text.strip()
    # OpenCompass shows answers in quotes.
    quoted = marker and len(stripped) > 1 and stripped[0] == stripped[-1] == "'"
    return stripped[1:-1] if quoted else text


def _whole_programs(text: str, functions: Sequence[str]) -> Iterator[str]:
    """Interpretations of ``text`` as a program that defines one of the functions, best first."""
    blocks = sorted(_find_blocks(text), key=lambda block: block.language in PYTHON_LANGUAGES)
    for index in reversed(range(len(blocks))):
        for code in _parseable_versions(blocks[index].code):
            if _is_answer(code, functions):
                later = [block.code for block in blocks[index + 1 :]]
                helpers = [block.code for block in blocks[:index]]
                helpers += [text for text in later if _defines_missing_names(text, code)]
                definitions = filter(None, map(_only_definitions, helpers))
                yield "\n".join([*definitions, _strip_demo_code(code)])
    for code in _unfenced_code(text, functions):
        if _is_answer(code, functions):
            yield _strip_demo_code(code)


def _completed_bodies(text: str, header: str, functions: Sequence[str]) -> Iterator[str]:
    """Interpretations of ``text`` as the body after ``header``, each with the header.

    Those that drop the fewest lines come first: a wrong indentation causes an early error.
    """
    if not header:
        return
    candidates: list[tuple[int, str]] = []
    prefix = header.rstrip()
    for code in [*(block.code for block in reversed(_find_blocks(text))), text]:
        stop = BODY_END.search(code, 1)
        for body in dict.fromkeys([code, code if stop is None else code[: stop.start()]]):
            for indented in _indentation_variants(body.rstrip()):
                program = f"{prefix}\n{indented}"
                trimmed = _trim_to_error(program, min_lines=prefix.count("\n") + 1)
                if trimmed is not None and _is_answer(trimmed, functions):
                    candidates.append((program.count("\n") - trimmed.count("\n"), trimmed))
    for _, trimmed in sorted(candidates, key=lambda pair: pair[0]):
        yield _strip_demo_code(trimmed)


def _indentation_variants(body: str) -> list[str]:
    """A body unchanged, with its first line indented, and indented as a whole."""
    first, _, rest = body.lstrip("\n").partition("\n")
    return [body, f"    {first.lstrip()}\n{rest}", textwrap.indent(textwrap.dedent(body), "    ")]


def _find_blocks(text: str) -> list[CodeBlock]:
    """All blocks in fences of backticks or tildes; an unclosed one extends to the end."""
    blocks: list[CodeBlock] = []
    lines = text.split("\n")
    fence, language, content = "", "", list[str]()
    for line in lines:
        if not fence:
            if len(line) > MAX_FENCE_LINE:
                continue
            inline = [match["code"].strip() for match in INLINE_CODE.finditer(line)]
            blocks += [CodeBlock(code, "inline") for code in inline]
            if opening := FENCE_OPENING.fullmatch(INLINE_CODE.sub("", line)):
                fence, language, content = opening["fence"], opening["language"].lower(), []
            continue
        before, closed = _split_closing_fence(line, fence)
        if before or not closed:
            content.append(before)
        if closed:
            blocks.append(CodeBlock(textwrap.dedent("\n".join(content)), language))
            fence = ""
    if fence:
        blocks.append(CodeBlock(textwrap.dedent("\n".join(content)), language))
    return blocks[-MAX_BLOCKS:]


def _split_closing_fence(line: str, fence: str) -> tuple[str, bool]:
    """The part of a line before a closing fence, and whether there is one."""
    stripped = line.rstrip()
    if not stripped.endswith(fence):
        return line, False
    before = stripped.rstrip(fence[0])
    return (before if before.strip() else ""), True


def _parseable_versions(code: str) -> Iterator[str]:
    """A block, or its part before the first syntax error."""
    if code.lstrip().startswith(">>>"):
        typed = [line for line in code.split("\n") if SESSION_PROMPT.match(line)]
        code = "\n".join(SESSION_PROMPT.sub("", line) for line in typed)
    if _parse(code) is not None:
        yield code
    elif (trimmed := _trim_to_error(code)) is not None:
        yield trimmed


def _unfenced_code(text: str, functions: Sequence[str]) -> Iterator[str]:
    """Interpretations from the lines where code may begin, or where a function is defined."""
    if _parse(text) is not None:
        yield text
    lines = text.split("\n")
    max_starts = min(MAX_STARTS, max(2, MAX_PARSED // (len(text) + 1)))
    starts = (n for n, line in enumerate(lines) if CODE_START.match(line.lstrip()))
    tails = ("\n".join(lines[start:]) for start in islice(starts, max_starts // 2))
    # A definition may start within a line: "Answer: def add(a, b): ..."
    definitions = re.finditer(rf"def\s+(?:{'|'.join(functions) or '$'})\b", text)
    indented = (
        " " * (match.start() - text.rfind("\n", 0, match.start()) - 1) + text[match.start() :]
        for match in definitions
    )
    for tail in islice(chain(tails, indented), max_starts):
        trimmed = _trim_to_error(textwrap.dedent(tail))
        if trimmed is not None:
            yield trimmed


def _trim_to_error(code: str, *, min_lines: int = 0) -> str | None:
    """``code`` before its first syntax error; None if at most ``min_lines`` lines remain."""
    lines = code.split("\n")
    for _ in range(MAX_TRIMS):
        parsed = _parse_or_error_line("\n".join(lines))
        if not isinstance(parsed, int):
            return "\n".join(lines)
        lines = lines[: max(0, min(parsed - 1, len(lines) - 1))]
        if len(lines) <= min_lines:
            break
    return None


def _parse(code: str) -> ast.Module | None:
    parsed = _parse_or_error_line(code)
    return None if isinstance(parsed, int) else parsed


@lru_cache(maxsize=2)
def _parse_or_error_line(code: str) -> ast.Module | int:
    """The syntax tree, or the line, from 1, of the first syntax error. The tree is shared."""
    try:
        with PARSE_LOCK, warnings.catch_warnings(action="ignore"):
            return ast.parse(code)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1


def _is_answer(code: str, functions: Sequence[str]) -> bool:
    """Whether it defines one of the functions (any, if none is named) with more than a stub."""
    tree = _parse(code)
    return tree is not None and _defines(tree, functions) and not _returns_outside(tree.body)


def _returns_outside(nodes: Sequence[ast.AST]) -> bool:
    """Whether there is a return outside a function, which parsing alone does not detect."""
    for node in nodes:
        if isinstance(node, ast.Return):
            return True
        inner = [] if isinstance(node, Function | ast.ClassDef) else ast.iter_child_nodes(node)
        if isinstance(node, ast.stmt | ast.ExceptHandler) and _returns_outside(list(inner)):
            return True
    return False


def _defines(tree: ast.Module, functions: Sequence[str]) -> bool:
    for node in tree.body:
        if isinstance(node, Function) and (not functions or node.name in functions):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if any(not _is_placeholder(line) for line in body):
                return True
        names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if any(name in functions for name in names):  # f = lambda x: ...
            return True
    return False


def _is_placeholder(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def _defines_missing_names(later: str, code: str) -> bool:
    """Whether a later block defines a name that the answer uses and does not define."""
    later_tree, code_tree = _parse(later), _parse(code)
    if later_tree is None or code_tree is None:
        return False
    names = [node for node in ast.walk(code_tree) if isinstance(node, ast.Name)]
    used = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    return bool(_defined_names(later_tree) & used - _defined_names(code_tree))


def _defined_names(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}


def _only_definitions(code: str) -> str:
    """The imports and definitions of a block, without statements that run something."""
    tree = _parse(code)
    kept = [
        node
        for node in (tree.body if tree else [])
        if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | Function)
        or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    ]
    return "\n".join(map(ast.unparse, kept))


def _strip_demo_code(code: str) -> str:
    """Removes top-level code that only demonstrates the answer.

    This is: prints, asserts, reads of input, a main part, and prose that parses as an expression.
    """
    tree = _parse(code)
    if tree is None:
        return code
    nodes = [node for node in tree.body if not _is_demo_code(node) or _is_setup_call(node, tree)]
    if len(nodes) == len(tree.body):
        return code
    return ast.unparse(ast.Module(nodes, []))


def _is_setup_call(node: ast.stmt, tree: ast.Module) -> bool:
    """Whether it calls a function of the answer for its side effect: ``fill_table()``."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    function = node.value.func
    return any(
        isinstance(function, ast.Name)
        and function.id == definition.name
        and not _has_output(definition)
        for definition in tree.body
        if isinstance(definition, ast.FunctionDef)
        if definition.name != "main"
        and not definition.name.startswith("test")
        and not _reads_input(definition)
    )


def _has_output(function: ast.FunctionDef) -> bool:
    """Whether a function returns or prints something, so that a call only demonstrates it."""
    return any(
        (isinstance(node, ast.Return) and node.value is not None)
        or (isinstance(node, ast.Name) and node.id == "print")
        for node in ast.walk(function)
    )


def _is_demo_code(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            return function.value.id in TEST_MODULES
        return isinstance(function, ast.Name)
    if isinstance(node, ast.Assign | ast.For | ast.While) and _reads_input(node):
        return True
    silent = isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and not node.value)
    return silent or isinstance(node, ast.Assert)


def _reads_input(node: ast.stmt) -> bool:
    """Whether it reads standard input, which is empty here."""
    calls = [child.func for child in ast.walk(node) if isinstance(child, ast.Call)]
    return any(isinstance(call, ast.Name) and call.id == "input" for call in calls)
