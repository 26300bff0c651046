"""The build of the kernels: when it runs, and an installation without a compiler."""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CPU = Path("src/coterie/ops/cpu")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the build hook reads; no library."""
    (tmp_path / CPU).mkdir(parents=True)
    for path in (ROOT / CPU).glob("*"):
        if path.suffix in (".py", ".cpp", ".hpp"):
            shutil.copy(path, tmp_path / CPU)
    return tmp_path


class FakeApp:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def display_warning(self, text: str) -> None:
        self.warnings.append(text)


def run_hook(project: Path, version: str = "editable") -> tuple[FakeApp, dict[str, Any]]:
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["Kernels"]
    app, build_data = FakeApp(), dict[str, Any](artifacts=[])
    made = hook.__new__(hook)
    # The base class takes ten arguments that this hook does not read.
    vars(made).update(_BuildHookInterface__root=str(project), _BuildHookInterface__app=app)
    made.initialize(version, build_data)
    return app, build_data


def test_without_a_compiler_the_installation_goes_on(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    app, build_data = run_hook(project)
    assert build_data["artifacts"] == []
    assert "PyTorch alone" in app.warnings[0]
    assert not (project / CPU / "libcoterie.so").exists()


def test_a_fresh_library_is_not_built_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = project / CPU / "libcoterie.so"
    library.write_bytes(b"built before")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    app, build_data = run_hook(project, "standard")
    assert build_data["artifacts"] == [f"/{CPU}/libcoterie.so"]
    assert build_data["tag"].startswith("py3-none-")
    os.utime(project / CPU / "main.cpp", (2**32, 2**32))
    app, build_data = run_hook(project)
    assert app.warnings
    assert not library.exists()
