"""The prose rules of CONTRIBUTING that a machine can check: banned words, lengths of lines."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "log.md"]
README_LINES, COLUMNS = 120, 100
BANNED = {
    *("who", "whom", "whose", "whoever", "nobody", "everybody", "somebody", "anybody"),
    *("told", "tell", "tells", "heard", "thought"),
}
STORIES = "lab/problems/"  # its word problems are about people
IDENTIFIER_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
FENCED = re.compile(r"^```.*?^```\s*$", re.M | re.S)


def test_sources_use_no_banned_word() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    suspects = {
        path: text
        for path, text in texts.items()
        if BANNED & {*words(text), *map(str.lower, IDENTIFIER_PART.findall(text))}
    }
    found = {path: list(banned_words(path, text)) for path, text in suspects.items()}
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


def banned_words(path: Path, text: str) -> Iterator[str]:
    """Each with its line; a file of story problems has its strings free."""
    tree = ast.parse(text)
    strings = () if STORIES in path.as_posix() else string_words(tree)
    for line, word in (*comment_words(text), *strings, *identifier_words(tree)):
        if word in BANNED:
            yield f"{line}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_no_banned_word(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    assert [word for word in words(re.sub(r"`[^`]*`", "", text)) if word in BANNED] == []


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_pages_fit(page: Path) -> None:
    """Outside tables, code and HTML; docs/results.md is generated."""
    if page.name == "results.md":
        return
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    long = [line for line in text.splitlines() if len(line) > COLUMNS]
    assert [line for line in long if not line.startswith(("|", "<", "    ", "!["))] == []


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def comment_words(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield from ((token.start[0], word) for word in words(token.string))


def string_words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Words of docstrings and all other string literals, without a chat format's channel names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(r"<\|channel>\w+", "", node.value)
            yield from ((node.lineno, word) for word in words(text))


def identifier_words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Parts of the names that the file defines; names that it only uses may be another's."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                pass
            case ast.ClassDef(name=name) | ast.arg(arg=name) | ast.alias(asname=str(name)):
                pass
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                pass
            case _:
                continue
        line = getattr(node, "lineno", 0)
        yield from ((line, part.lower()) for part in IDENTIFIER_PART.findall(name))
