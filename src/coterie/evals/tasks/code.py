"""Finds the program in what a model wrote, and asks the sandbox whether it passes its tests."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

from coterie.evals.task import Grade
from coterie.evals.tasks.boxes import answered
from coterie.sandbox import run

PYTHON = ("", "python", "python3", "py", "py3", "python-repl", "pycon")
LONGEST_FENCE = 500  # characters of a line that may open one
MOST_BLOCKS = 100  # from the last
TRIES = 60  # cuts of an unfenced text at its next error

OPENING = re.compile(
    r"(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*\{?\.?(?P<language>[\w+-]*)[^`~]*$"
)
INLINE = re.compile(r"(?P<ticks>`{1,4})(?:python3?[ \t]|py[ \t])?(?P<code>[^`\n]+)(?P=ticks)(?!`)")
STARTS = re.compile(
    r"(?:import|from|def|class|async def)\b|@|[A-Za-z_]\w*(?: *: *[\w\[\], ]+)? *=[^=]"
)
STOPS = re.compile(r"^(?:def|class|@|if|print|assert|#|```|~~~|\[DONE\]|<)", re.MULTILINE)
FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
ODD = {0xA0: " ", 0xFEFF: None, 0x200B: None}  # what editors put between: hard and no spaces
SESSION = re.compile(r"^(?:>>>|\.\.\.)(?: |$)", re.MULTILINE)
TRIALS = ("doctest", "unittest")  # modules whose calls at top level only try the answer out

PARSING = Lock()  # warnings are silenced for the whole process: one thread at a time

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Block:
    """What stood in one code fence; ``language`` in lower case, empty when none was given."""

    code: str
    language: str


def grade(output: str, tests: str, *, header: str = "", trust: bool = False) -> Grade:
    """Runs the program found in ``output`` before ``tests``; ``header`` as in ``extract``."""
    wanted = called(tests)
    code = extract(output, wanted, header)
    if code is None:
        return Grade(False, None)
    parts = [preamble(header, wanted), code, tests]
    program = _future_first("\n\n".join(part for part in parts if part))
    return Grade(run(program, trust=trust).passed, code)


def extract(output: str, wanted: Sequence[str], header: str = "") -> str | None:
    """The code that defines one of ``wanted``, without its own trials; None for a blank output.

    ``header`` is what the model was to continue: an output that gives only a function's body
    comes back behind it. Of several fences that define it the last counts, and what earlier ones
    define comes along. Where nothing can be read as such, the likeliest text is returned.
    """
    said = _said(output)
    if not said.strip():
        return None
    for text in dict.fromkeys([said, said.translate(ODD).replace("\\_", "_")]):
        for code in (*_whole(text, wanted), *_bodies(text, header, wanted)):
            return code
    blocks = _blocks(said)
    return blocks[-1].code if blocks else said


def called(tests: str) -> tuple[str, ...]:
    """The functions that ``tests`` call and neither define nor find among the builtins.

    Of HumanEval's form, ``check(name)``, the one that is checked.
    """
    tree = _parsed(tests)
    if tree is None:
        return ()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    names = [(call.func.id, call) for call in calls if isinstance(call.func, ast.Name)]
    checked = [call.args[0] for name, call in names if name == "check" and call.args]
    if checked and _defines(tree, ["check"]):
        return tuple(argument.id for argument in checked if isinstance(argument, ast.Name))
    known = {*dir(builtins), *(node.name for node in tree.body if isinstance(node, Function))}
    return tuple(dict.fromkeys(name for name, _ in names if name not in known))


def preamble(header: str, wanted: Sequence[str]) -> str:
    """What stands in ``header`` above the function to write: imports, and functions to use."""
    starts = [re.search(rf"^(?:async\s+)?def\s+{name}\b", header, re.MULTILINE) for name in wanted]
    found = [start.start() for start in starts if start is not None]
    return header[: min(found)].rstrip() if found else ""


def _future_first(program: str) -> str:
    """Python wants these imports above all others, and an answer comes below the header's."""
    return "\n".join([*FUTURE.findall(program), FUTURE.sub("", program)])


def _said(output: str) -> str:
    """The answer itself: after any thinking, between ``[BEGIN]`` and ``[DONE]``, up to the end."""
    text = answered(output).replace("\r\n", "\n").rpartition("</think>")[2]
    before, begun, after = text.partition("[DONE]")[0].rpartition("[BEGIN]")
    text = (after if begun else before + after).strip("\n")
    bare = text.strip()
    quoted = begun and len(bare) > 1 and bare[0] == bare[-1] == "'"  # as OpenCompass shows it
    return bare[1:-1] if quoted else text


def _whole(text: str, wanted: Sequence[str]) -> Iterator[str]:
    """Readings of ``text`` as a whole program that defines what is wanted, best first."""
    blocks = sorted(_blocks(text), key=lambda block: block.language in PYTHON)
    for place in reversed(range(len(blocks))):
        for code in _readings(blocks[place].code):
            if _is_answer(code, wanted):
                beside = [block.code for block in blocks[:place]]
                beside += [b.code for b in blocks[place + 1 :] if _helps(b.code, code)]
                found = filter(None, map(_definitions, beside))
                yield "\n".join([*found, _without_trials(code)])
    for code in _unfenced(text, wanted):
        if _is_answer(code, wanted):
            yield _without_trials(code)


def _bodies(text: str, header: str, wanted: Sequence[str]) -> Iterator[str]:
    """Readings of ``text`` as what follows ``header``, each returned behind the header's own.

    Those that drop the fewest lines come first: a body that was moved wrongly has an early error.
    """
    if not header:
        return
    found: list[tuple[int, str]] = []
    above = header.rstrip()
    for code in [*(block.code for block in reversed(_blocks(text))), text]:
        stop = STOPS.search(code, 1)
        for body in dict.fromkeys([code, code if stop is None else code[: stop.start()]]):
            for indented in _indented(body.rstrip()):
                asked = f"{above}\n{indented}"
                whole = _trimmed(asked, keep=above.count("\n") + 1)
                if whole is not None and _is_answer(whole, wanted):
                    found.append((asked.count("\n") - whole.count("\n"), whole))
    yield from (_without_trials(whole) for _, whole in sorted(found, key=lambda pair: pair[0]))


def _indented(body: str) -> list[str]:
    """A body as it stands, with only its first line moved back, and moved as a whole."""
    first, _, rest = body.lstrip("\n").partition("\n")
    return [body, f"    {first.lstrip()}\n{rest}", textwrap.indent(textwrap.dedent(body), "    ")]


def _blocks(text: str) -> list[Block]:
    """Every fenced block, of backticks or tildes; one that is never closed runs to the end."""
    found: list[Block] = []
    lines = text.split("\n")
    fence, language, inside = "", "", list[str]()
    for line in lines:
        if not fence:
            if len(line) > LONGEST_FENCE:
                continue
            inline = [Block(one["code"].strip(), "inline") for one in INLINE.finditer(line)]
            found += inline
            if opening := OPENING.fullmatch(INLINE.sub("", line)):
                fence, language, inside = opening["fence"], opening["language"].lower(), []
            continue
        before, closed = _closed(line, fence)
        if before or not closed:
            inside.append(before)
        if closed:
            found.append(Block(textwrap.dedent("\n".join(inside)), language))
            fence = ""
    if fence:
        found.append(Block(textwrap.dedent("\n".join(inside)), language))
    return found[-MOST_BLOCKS:]


def _closed(line: str, fence: str) -> tuple[str, bool]:
    """What a line holds before a closing fence, and whether there is one."""
    bare = line.rstrip()
    if not bare.endswith(fence):
        return line, False
    before = bare.rstrip(fence[0])
    return (before if before.strip() else ""), True


def _readings(code: str) -> Iterator[str]:
    """A block as it stands, else up to its first error (it was cut off, or prose follows)."""
    if code.lstrip().startswith(">>>"):
        code = "\n".join(SESSION.sub("", line) for line in code.split("\n") if SESSION.match(line))
    if _parsed(code) is not None:
        yield code
    elif (trimmed := _trimmed(code)) is not None:
        yield trimmed


def _unfenced(text: str, wanted: Sequence[str]) -> Iterator[str]:
    """Readings that begin where code may begin: the first such line, and the wanted function's."""
    if _parsed(text) is not None:
        yield text
    lines = text.split("\n")
    starts = [n for n, line in enumerate(lines) if STARTS.match(line.lstrip())][:8]
    tails = [lines[start:] for start in starts]
    # Also in the middle of a line: "Answer: def add(a, b): ..."
    for match in re.finditer(rf"def\s+(?:{'|'.join(wanted) or '$'})\b", text):
        column = match.start() - text.rfind("\n", 0, match.start()) - 1
        tails.append((" " * column + text[match.start() :]).split("\n"))
    for tail in tails[:16]:
        trimmed = _trimmed(textwrap.dedent("\n".join(tail)))
        if trimmed is not None:
            yield trimmed


def _trimmed(code: str, *, keep: int = 0) -> str | None:
    """``code`` without the lines from its first error on; None where no more than ``keep`` stay."""
    lines = code.split("\n")
    for _ in range(TRIES):
        error = _error_line("\n".join(lines))
        if error is None:
            return "\n".join(lines)
        lines = lines[: max(0, min(error - 1, len(lines) - 1))]
        if len(lines) <= keep:
            break
    return None


def _parsed(code: str) -> ast.Module | None:
    try:
        with PARSING, warnings.catch_warnings(action="ignore"):
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _error_line(code: str) -> int | None:
    """The line, from 1, of the first error; None where all can be read."""
    try:
        with PARSING, warnings.catch_warnings(action="ignore"):
            ast.parse(code)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None


def _is_answer(code: str, wanted: Sequence[str]) -> bool:
    """Whether it defines, beyond a stub, what is wanted; anything, where nobody says what."""
    tree = _parsed(code)
    return tree is not None and _defines(tree, wanted) and not _returns_outside(tree.body)


def _returns_outside(nodes: Sequence[ast.AST]) -> bool:
    """Whether a return stands in no function, which is an error that only compiling finds."""
    for node in nodes:
        if isinstance(node, ast.Return):
            return True
        inner = [] if isinstance(node, Function | ast.ClassDef) else ast.iter_child_nodes(node)
        if isinstance(node, ast.stmt | ast.ExceptHandler) and _returns_outside(list(inner)):
            return True
    return False


def _defines(tree: ast.Module, wanted: Sequence[str]) -> bool:
    for node in tree.body:
        if isinstance(node, Function) and (not wanted or node.name in wanted):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if any(not _says_nothing(line) for line in body):
                return True
        names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if any(name in wanted for name in names):  # f = lambda x: ...
            return True
    return False


def _says_nothing(line: ast.stmt) -> bool:
    return isinstance(line, ast.Pass) or (
        isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
    )


def _helps(later: str, code: str) -> bool:
    """Whether a block below the answer defines what the answer uses and does not define."""
    lower, upper = _parsed(later), _parsed(code)
    if lower is None or upper is None:
        return False
    names = [node for node in ast.walk(upper) if isinstance(node, ast.Name)]
    used = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    return bool(_defined(lower) & used - _defined(upper))


def _defined(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}


def _definitions(code: str) -> str:
    """Only what another block imports and defines: what it runs belongs to the prose."""
    tree = _parsed(code)
    return "\n".join(map(ast.unparse, filter(_is_definition, tree.body if tree else [])))


def _is_definition(node: ast.stmt) -> bool:
    constant = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | Function)


def _without_trials(code: str) -> str:
    """Without what only tries the answer out at top level, or does nothing: prints, asserts,
    what is typed in, a main part, a word of prose that happens to be an expression."""
    tree = _parsed(code)
    if tree is None:
        return code
    kept = [node for node in tree.body if not _is_trial(node) or _prepares(node, tree)]
    if len(kept) == len(tree.body):
        return code
    tree.body = kept
    return ast.unparse(tree)


def _prepares(node: ast.stmt, tree: ast.Module) -> bool:
    """Whether it calls, for its effect alone, a function of the answer's own: ``fill_table()``."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    called = node.value.func
    return any(
        isinstance(called, ast.Name) and called.id == one.name and not _gives(one)
        for one in tree.body
        if isinstance(one, ast.FunctionDef)
        if one.name != "main" and not one.name.startswith("test") and not _asks(one)
    )


def _gives(function: ast.FunctionDef) -> bool:
    """Whether it returns or prints something: then a call at top level only shows it."""
    return any(
        (isinstance(one, ast.Return) and one.value is not None)
        or (isinstance(one, ast.Name) and one.id == "print")
        for one in ast.walk(function)
    )


def _is_trial(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            return function.value.id in TRIALS
        return isinstance(function, ast.Name)
    if isinstance(node, ast.Assign | ast.For | ast.While) and _asks(node):
        return True
    silent = isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and not node.value)
    return silent or isinstance(node, ast.Assert)


def _asks(node: ast.stmt) -> bool:
    """Whether it waits for somebody to type: nobody does."""
    calls = [one.func for one in ast.walk(node) if isinstance(one, ast.Call)]
    return any(isinstance(call, ast.Name) and call.id == "input" for call in calls)
