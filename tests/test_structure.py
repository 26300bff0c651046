"""The house stands as it is drawn: floors, budgets, one place for versions, two commands."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import coterie

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
KERNELS = ("ops/triton/", "ops/cpu/")
FILE_LINES, FUNCTION_LINES = 500, 60
RUN, DUPLICATED = 6, 0.03
WHOLE_PARTS_OF_EXTRAS = {
    ("study", "matplotlib"),
    ("triton", "triton"),
    ("figures", "matplotlib"),
    ("harness", "lm_eval"),
    ("harness", "tqdm"),
}


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


def test_what_only_a_gpu_needs_is_not_imported() -> None:
    code = "import sys, coterie.cli; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=True)


def test_no_file_is_over_budget() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: n for path, n in lengths.items() if n > FILE_LINES} == {}


def test_no_function_is_over_budget() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        if not any(part in path.as_posix() for part in KERNELS)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]
    assert long == []


def test_little_is_written_twice() -> None:
    lines = {path: code_lines(path) for path in SOURCES}
    repeated, total = duplicated(lines), sum(map(len, lines.values()))
    assert len(repeated) <= DUPLICATED * total, sorted(repeated)


def test_versions_are_pinned_in_one_place() -> None:
    found = project()["project"]
    extras = found["optional-dependencies"].values()
    named = [name for group in (found["dependencies"], *extras) for name in group]
    named = [name for name in named if not name.startswith("coterie[")]
    direct = {re.match(r"[\w-]+", requirement).group() for requirement in named}  # type: ignore[union-attr]
    text = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"^([\w-]+)==", text, re.M)) == direct


def test_every_import_is_a_declared_dependency() -> None:
    """At module level; inside a function, and in a part that needs one, it may be of an extra."""
    declared = {re.split(r"[>=<]", d)[0] for d in project()["project"]["dependencies"]}
    ours = {"coterie", *sys.stdlib_module_names, *(d.replace("-", "_") for d in declared)}
    strangers = {
        f"{path.name}: {name}"
        for path in SOURCES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        for name in imported(node)
        if name not in ours and (path.parent.name, name) not in WHOLE_PARTS_OF_EXTRAS
    }
    assert strangers == set()


def test_the_package_and_the_project_agree_on_the_version() -> None:
    assert coterie.__version__ == project()["project"]["version"]


def test_the_public_face_is_this() -> None:
    assert sorted(coterie.__all__) == sorted(PUBLIC)
    assert all(hasattr(coterie, name) for name in coterie.__all__)


def test_the_two_commands_exist_and_ci_calls_one_of_them() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= set(re.findall(r"^(\w+):", makefile, re.M))
    assert "exec make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_figures_of_the_readme_are_the_records() -> None:
    figures = runpy.run_path(str(ROOT / "scripts" / "figures.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == figures["filled"](text)


def test_every_script_can_be_run() -> None:
    scripts = [p for p in (ROOT / "scripts").iterdir() if not p.suffix and p.name != "preamble"]
    assert {"check", "test", "parity", "bench", "gpu"} <= {path.name for path in scripts}
    assert [path.name for path in scripts if not os.access(path, os.X_OK)] == []


def imported(node: ast.stmt) -> list[str]:
    """The top names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        return [node.module.partition(".")[0]]
    return []


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of lines that say something: no blanks, comments, imports, brackets."""
    text = path.read_text(encoding="utf-8")
    passed = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    stripped = enumerate((line.strip() for line in text.splitlines()), start=1)
    return [
        (number, line)
        for number, line in stripped
        if number not in passed and not line.startswith("#") and re.search(r"\w", line)
    ]


def duplicated(lines: dict[Path, list[tuple[int, str]]]) -> set[tuple[str, int]]:
    """The lines that lie in a run of six or more which stands somewhere else too."""
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, found in lines.items():
        for start in range(len(found) - RUN + 1):
            run = tuple(line for _, line in found[start : start + RUN])
            places[run].append((path, start))
    return {
        (path.name, lines[path][start + step][0])
        for spots in places.values()
        if len(spots) > 1
        for path, start in spots
        for step in range(RUN)
    }


PUBLIC = [
    *("Coarse", "CoterieError", "Denoised", "Engine", "Event", "Experts", "Finished", "Generation"),
    *("Memory", "POLICIES", "Result", "__version__", "load", "parse_policy", "spell"),
]
