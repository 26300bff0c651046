"""Policies from outside the package: registered, from a file, and from an installed package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.errors import ConfigError
from coterie.routing import (
    POLICIES,
    check_coreset_reuse,
    format_policy,
    parse_policy,
    plugins,
    route,
)
from coterie.specs import PositiveInt
from coterie.values import PreviousCoresets, RouterSpec, Scores

FILE = """
from dataclasses import dataclass
import coterie

@coterie.register_policy("first-experts")
@dataclass(frozen=True)
class FirstExperts:
    "Lets tokens use the first experts."
    count: int = 4

    def eligible(self, scores, k):
        import torch
        return (torch.arange(scores.logits.shape[-1]) < self.count).view(1, 1, -1)
"""


@pytest.fixture(autouse=True)
def _same_policies_afterwards() -> Iterator[None]:
    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)


@dataclass(frozen=True)
class LastExperts:
    count: PositiveInt

    def eligible(self, scores: Scores, k: int) -> Tensor:
        experts = scores.logits.shape[-1]
        return (torch.arange(experts) >= experts - self.count).view(1, 1, -1)


@dataclass(frozen=True)
class Returning:
    """A policy that returns what it is given."""

    value: Any

    def eligible(self, scores: Scores, k: int) -> Tensor:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def some_scores(seed: int) -> Scores:
    logits = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed))
    return Scores(logits, RouterSpec(experts=16, k=4, activation="softmax", renormalise=True))


@pytest.mark.parametrize("count", [4, 7, 16])
def test_registered_policy_reads_prints_and_routes(count: int) -> None:
    assert plugins.register_policy("last-experts")(LastExperts) is LastExperts
    policy = parse_policy(f"last-experts:count={count}")
    assert policy == LastExperts(count)
    assert format_policy(policy) == f"last-experts:count={count}"
    used = route(some_scores(count), policy).used.nonzero()[:, 0]
    assert int(used.min()) >= 16 - count


def test_registered_policy_with_one_mask_a_row_reuses_coresets() -> None:
    plugins.register_policy("last-experts")(LastExperts)
    policy = parse_policy("last-experts:count=5")
    check_coreset_reuse(policy)
    earlier = torch.zeros(1, 16, dtype=torch.bool)
    previous = PreviousCoresets(0.5, earlier)
    used = route(replace(some_scores(1), previous_coresets=previous), policy).used
    assert int(used.nonzero()[:, 0].min()) >= 11


@pytest.mark.parametrize("name", ["vanilla", "Two Words", "", "-x", "a:b"])
def test_bad_or_taken_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="policy"):
        plugins.register_policy(name)(LastExperts)


def test_other_classes_are_refused() -> None:
    @dataclass
    class Mutable:
        pass

    @dataclass(frozen=True)
    class Blind:
        pass

    for cls, message in ((Mutable, "frozen"), (Blind, "eligible"), (int, "frozen")):
        with pytest.raises(ConfigError, match=message):
            plugins.register_policy("mine")(cls)
    assert "mine" not in POLICIES


def test_file_registers_policies(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    assert plugins.import_policies(path) == ["first-experts"]
    assert format_policy(parse_policy("first-experts:count=2")) == "first-experts:count=2"


@pytest.mark.parametrize("text", ["", "1 +", "raise OSError('gone')", FILE.replace("first-", "!")])
def test_bad_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.py"):
        plugins.import_policies(path)
    with pytest.raises(ConfigError, match="no such file"):
        plugins.import_policies(tmp_path / "absent.py")


def test_installed_packages_bring_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("last-experts", f"{__name__}:LastExperts", plugins.ENTRY_POINTS)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    plugins.load_installed_policies.cache_clear()
    plugins.load_installed_policies()
    assert POLICIES["last-experts"].__name__ == "LastExperts"
    bad = EntryPoint("broken", "nowhere.at.all:X", plugins.ENTRY_POINTS)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [bad])
    plugins.load_installed_policies.cache_clear()
    with pytest.raises(ConfigError, match="broken"):
        plugins.load_installed_policies()
    plugins.load_installed_policies.cache_clear()


@pytest.mark.parametrize(
    "value",
    [
        None,
        torch.ones(1, 1, 16),
        torch.ones(16, dtype=torch.bool),
        torch.ones(1, 3, 16, dtype=torch.bool),
        torch.ones(1, 1, 5, dtype=torch.bool),
        RuntimeError("size mismatch"),
    ],
)
def test_faulty_mask_is_an_error_that_names_the_policy(value: object) -> None:
    with pytest.raises(ConfigError, match="policy Returning"):
        route(some_scores(1), Returning(value))
