"""The package keeps its layers, its budgets, one place for versions and its two commands."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest
from script_modules import load_script

import coterie

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "coterie"
SOURCES = sorted((ROOT / "src").rglob("*.py"))
KERNELS = ("ops/triton/", "ops/cpu/")
FILE_LINES, FUNCTION_LINES = 500, 60
# Ceilings, which only go down. Goals: 36,000 for the package, 5,500 for the study, 3,000 for cli.
FOLDER_LINES = {
    "src/coterie": 50_860,
    "src/coterie/lab/study": 5_500,
    "src/coterie/cli": 3_690,
    "src/coterie/lab/replay": 1_620,
    "scripts": 600,
    "experiments": 2_235,
}
RUN_LINES, DUPLICATED_SHARE = 6, 0.03
OPTIONAL_IMPORTS = {
    ("lab", "matplotlib"),
    ("study", "matplotlib"),
    ("triton", "triton"),
    ("harness", "lm_eval"),
    ("harness", "tqdm"),
    ("server", "fastapi"),
    ("server", "prometheus_client"),
    ("server", "pydantic"),
    ("server", "starlette"),
    ("server", "uvicorn"),
}
PREPOSITIONS = {
    *("above", "ahead", "apart", "around", "aside", "before", "behind", "below", "beside"),
    *("beyond", "over", "under", "after", "here", "there", "far"),
}
PARTICIPLES = {
    *("asked", "drawn", "found", "given", "held", "kept", "known", "lent", "seen", "settled"),
    *("told", "written", "chosen", "heard", "named", "opened", "mixed", "served"),
}
NOUNS = {"testing", "plotting", "training", "routing", "decoding", "loading", "sampling", "tuning"}
NOUNS |= {"timing", "grading", "embedded", "interleaved", "packed", "published", "paired", "boxed"}
FLAG = re.compile(r"(?<![\w-])--[a-z]")
FLAG_FOLDERS = ("cli/", "lab/sandbox/", "lab/parity/__main__.py")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_imports_go_down_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports as l; exit(l())"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_imports_what_only_a_gpu_needs() -> None:
    """At its top, where every command would import it."""
    for path in SOURCES:
        if "ops/triton/" not in path.as_posix():
            imports = [each for each in parsed(path).body if "triton" in imported_parts(each)]
            assert imports == [], name(path)


@pytest.mark.slow
def test_what_only_a_gpu_needs_is_not_imported() -> None:
    code = "import sys, coterie.cli; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=True)


def test_no_file_is_over_budget() -> None:
    lengths = {name(path): line_count(path) for path in SOURCES}
    assert {path: n for path, n in lengths.items() if n > FILE_LINES} == {}


@pytest.mark.parametrize(("folder", "budget"), FOLDER_LINES.items())
def test_no_folder_is_over_budget(folder: str, budget: int) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix in ("", ".py")]
    assert sum(map(line_count, files)) <= budget


def test_no_function_is_over_budget() -> None:
    long = [
        f"{name(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        if not any(part in path.as_posix() for part in KERNELS)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]
    assert long == []


def test_little_is_written_twice() -> None:
    lines = {path: code_lines(path) for path in SOURCES}
    repeated, total = duplicated(lines), sum(map(len, lines.values()))
    assert len(repeated) <= DUPLICATED_SHARE * total, sorted(repeated)


def test_class_names_are_unique() -> None:
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {cls: count for cls, count in names.items() if count > 1} == {}


def test_modules_are_nouns() -> None:
    """No gerund, preposition or participle, except those that are the field's nouns."""
    stems = {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES}
    wrong = {
        stem
        for stem in stems
        for last in [stem.rpartition("_")[2]]
        if last not in NOUNS
        and (last.endswith("ing") or last in PREPOSITIONS or last in PARTICIPLES)
    }
    assert wrong == set()


def test_only_the_command_line_names_flags() -> None:
    """Errors below the command line name fields; the command line maps these to its flags."""
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in SOURCES
        if not path.relative_to(ROOT / "src").as_posix().startswith(flag_folders())
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if FLAG.search(node.value) and not node.value.startswith("-")  # another program's
    ]
    assert wrong == []


def flag_folders() -> tuple[str, ...]:
    return ("_coterie.py", *(f"coterie/{folder}" for folder in FLAG_FOLDERS))


def test_versions_are_pinned_in_one_place() -> None:
    metadata = project()["project"]
    extras = metadata["optional-dependencies"].values()
    named = [name for group in (metadata["dependencies"], *extras) for name in group]
    named = [name for name in named if not name.startswith("coterie[")]
    direct = {re.match(r"[\w-]+", requirement).group() for requirement in named}
    text = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"^([\w-]+)==", text, re.M)) == direct


def test_every_import_is_a_declared_dependency() -> None:
    """At module level; inside a function, and in a part that needs one, it may be of an extra."""
    declared = {re.split(r"[>=<]", d)[0] for d in project()["project"]["dependencies"]}
    ours = {
        "coterie",
        "_coterie",
        *sys.stdlib_module_names,
        *(d.replace("-", "_") for d in declared),
    }
    undeclared = {
        f"{path.name}: {imported}"
        for path in SOURCES
        for node in parsed(path).body
        for imported in imported_packages(node)
        if imported not in ours and (path.parent.name, imported) not in OPTIONAL_IMPORTS
    }
    assert undeclared == set()


def test_the_package_and_the_project_agree_on_the_version() -> None:
    assert coterie.__version__ == project()["project"]["version"]


def test_the_public_names_are_these() -> None:
    assert sorted(coterie.__all__) == sorted(PUBLIC)
    assert all(hasattr(coterie, name) for name in coterie.__all__)


def test_the_two_commands_exist_and_ci_checks_and_tests() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= set(re.findall(r"^(\w+):", makefile, re.M))
    steps = re.findall(r"^scripts/\w+", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    assert steps == ["scripts/check", "scripts/test"]


def test_the_generated_tables_are_those_of_the_records() -> None:
    docs = load_script("docs.py")
    text = docs.TABLES_PAGE.read_text(encoding="utf-8")
    assert text == docs.with_tables(text)


def test_every_script_can_be_run() -> None:
    scripts = [p for p in (ROOT / "scripts").iterdir() if p.is_file() and not p.suffix]
    scripts = [path for path in scripts if path.name != "preamble"]
    assert {"check", "test", "parity", "bench", "gpu", "docs"} <= {path.name for path in scripts}
    assert [path.name for path in scripts if not os.access(path, os.X_OK)] == []


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_parts(node: ast.stmt) -> set[str]:
    """The names of packages, modules and objects that a statement imports."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return set()
    names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
    return {part for name in names for part in name.split(".")}


def imported_packages(node: ast.stmt) -> list[str]:
    """The top-level names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        return [node.module.partition(".")[0]]
    return []


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of lines of code: without blanks, comments, imports and lone brackets."""
    text = path.read_text(encoding="utf-8")
    skipped = {
        number
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    stripped = enumerate((line.strip() for line in text.splitlines()), start=1)
    return [
        (number, line)
        for number, line in stripped
        if number not in skipped and not line.startswith("#") and re.search(r"\w", line)
    ]


def duplicated(lines: dict[Path, list[tuple[int, str]]]) -> set[tuple[str, int]]:
    """The lines of every run of six or more that occurs elsewhere too."""
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, numbered in lines.items():
        for start in range(len(numbered) - RUN_LINES + 1):
            run = tuple(line for _, line in numbered[start : start + RUN_LINES])
            places[run].append((path, start))
    return {
        (path.name, lines[path][start + step][0])
        for spots in places.values()
        if len(spots) > 1
        for path, start in spots
        for step in range(RUN_LINES)
    }


PUBLIC = [
    *("CoterieError", "Denoised", "Engine", "Event", "ExpertMemoryConfig", "ExpertUsage"),
    *("Finished", "GenerationConfig", "LowPrecisionExperts", "POLICIES", "Result"),
    *("__version__", "format_policy", "load", "parse_policy", "register_policy"),
]
