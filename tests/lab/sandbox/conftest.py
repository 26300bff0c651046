"""The backends of the sandbox that work on this machine."""

from __future__ import annotations

import pytest

from coterie.lab.sandbox import backends
from coterie.lab.sandbox.runner import _backend_problem

BACKENDS = backends.backend_candidates()
if "bubblewrap" not in [backend.name for backend in BACKENDS]:
    BACKENDS.append(backends.Bubblewrap("/usr/bin/bwrap"))  # reported as skipped
# The first of each kind runs always; the rest are slow tests.
BEST = {backend.name: backend for backend in reversed(BACKENDS)}


def label(backend: backends.SandboxBackend) -> str:
    separate = getattr(backend, "separate_users", False)
    user = "separate-users" if separate else "user-namespace"
    return f"{backend.name}-{user}"


@pytest.fixture(
    params=[
        pytest.param(
            backend,
            id=label(backend),
            marks=() if backend is BEST[backend.name] else pytest.mark.slow,
        )
        for backend in BACKENDS
    ]
)
def backend(request: pytest.FixtureRequest) -> backends.SandboxBackend:
    """Each backend that works here; the rest are skipped with a reason."""
    if (problem := _backend_problem(request.param)) is not None:
        pytest.skip(f"NOT TESTED: {label(request.param)} does not work on this machine ({problem})")
    return request.param
