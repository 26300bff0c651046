"""The package's names load on first use, and OpenMP's settings are there before torch is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import coterie

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def output(program: str, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    paths = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_version_needs_no_torch():
    program = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n"
        "sys.argv = ['coterie', '--version']; import _coterie; _coterie.main()"
    )
    assert output(program).split() == ["coterie", coterie.__version__, "False"]


def test_every_name_loads():
    for name in coterie.__all__:
        assert getattr(coterie, name) is not None
        assert name in dir(coterie)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = coterie.missing


@pytest.mark.parametrize(
    ("before", "variables", "expected"),
    [
        ("", {}, "PASSIVE 20000"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ("", {"GOMP_SPINCOUNT": "5"}, "None 5"),
        ("import sys, types; sys.modules['torch'] = types.ModuleType('torch')", {}, "None None"),
    ],
)
def test_openmp_has_our_settings_unless_it_has_others(
    before: str, variables: dict[str, str], expected: str
):
    program = f"{before}\nimport coterie, os; print(*map(os.environ.get, {VARIABLES}))"
    assert output(program, **variables) == expected
