"""``coterie generate`` while it runs: streamed text, cut answers, and policies from a file."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.cli.entry import check_repeats, run, utf8_text, with_imports_first
from coterie.routing import POLICIES
from coterie.routing.descriptions import MEANINGS, option_meaning
from coterie.specs import spec_options
from coterie.testing import write_checkpoint

pytestmark = pytest.mark.usefixtures("embedded_once")

Capture = pytest.CaptureFixture[str]
POLICY_FILE = """
from dataclasses import dataclass
import coterie, torch

@coterie.register_policy("even-experts")
@dataclass(frozen=True)
class EvenExperts:
    "Lets tokens use experts with an even index only."

    def eligible(self, scores, k):
        return (torch.arange(scores.logits.shape[-1]) % 2 == 0).view(1, 1, -1)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny"), "llada2", seed=3))


class Writes(io.StringIO):
    """Standard output that keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def write(self, text: str, /) -> int:
        self.parts.append(text)
        return super().write(text)


def test_text_is_printed_as_soon_as_it_is_final(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["generate", "5 17 33 2 9", "--model", model, "-n", "40", "--block", "8"]
    assert run(command) == 0
    whole = capsys.readouterr()
    output = Writes()
    monkeypatch.setattr(sys, "stdout", output)
    assert run(command) == 0
    assert output.getvalue() == whole.out
    assert len([part for part in output.parts if part.strip()]) >= 5


def test_policy_of_a_file_runs_in_any_command(model: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mine.py"
    path.write_text(POLICY_FILE)
    try:
        words = ["generate", "5 9", "-n", "8", "--block", "8", "--model", model]
        assert run([*words, "-p", "even-experts", "--import", str(path)]) == 0
        assert capsys.readouterr().out.strip()
        assert run(["policies", "even-experts"]) == 0
        assert "even index" in capsys.readouterr().out
        assert run(["--import", str(path), "policies"]) == 2
        assert "already" in capsys.readouterr().err
    finally:
        POLICIES.pop("even-experts", None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "--import", "f", "b"], ["--import", "f", "a", "b"]),
        (["a", "--import=f", "--import", "g"], ["--import=f", "--import", "g", "a"]),
        (["a", "--", "--import", "f"], ["a", "--", "--import", "f"]),
        (["a"], ["a"]),
    ],
)
def test_imports_come_first(arguments: list[str], expected: list[str]) -> None:
    assert with_imports_first(arguments) == expected


def test_import_without_a_file_is_refused(capsys: Capture) -> None:
    assert run(["policies", "--import"]) == 2
    assert "--import" in capsys.readouterr().err


def test_every_option_of_a_policy_has_a_meaning() -> None:
    options = {option for cls in POLICIES.values() for option in spec_options(cls)}
    assert options == set(MEANINGS)


@dataclass(frozen=True)
class FirstOf:
    """Tokens use few experts (ours). Only the ``first`` ones count; others are left out."""

    first: int
    ratio: float = 0.5


@pytest.mark.parametrize(
    ("option", "meaning"),
    [("first", "Only the first ones count; others are left out"), ("ratio", "not described")],
)
def test_an_option_of_a_plug_in_means_what_the_docstring_says(option: str, meaning: str) -> None:
    assert option_meaning(FirstOf, option) == meaning


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_explains_one(name: str, capsys: Capture) -> None:
    assert run(["policies", name]) == 0
    printed = capsys.readouterr().out
    assert name in printed
    assert all(option in printed for option in spec_options(POLICIES[name]))


def test_unknown_policy_is_refused(capsys: Capture) -> None:
    assert run(["policies", "des-vot"]) == 2
    assert "des-vote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (["-n", "4", "--max-new-tokens=5"], "--max-new-tokens"),
        (["-p", "vanilla", "-p", "des-seq:k=2"], "--policy"),
    ],
)
def test_option_given_twice_is_refused(options: list[str], flag: str, capsys: Capture) -> None:
    assert run(["generate", "5", *options]) == 2
    assert f"{flag} is given twice" in capsys.readouterr().err


def test_options_that_may_repeat_and_values_like_options_are_accepted() -> None:
    check_repeats(["compare", "5", "-p", "vanilla", "-p", "topk:k=2"])
    check_repeats(["generate", "--seed", "1", "--", "--seed"])
    check_repeats(["generate", "-n", "-n"])


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_arguments_are_read_as_utf8_in_any_locale(text: str) -> None:
    as_latin = text.encode().decode("ascii", "surrogateescape")
    assert utf8_text(as_latin) == utf8_text(text) == text


def test_more_experts_than_the_model_has_is_remarked(model: str, capsys: Capture) -> None:
    assert run(["generate", "5", "-m", model, "-n", "2", "-p", "topk:k=100"]) == 0
    assert "k=4 is the same" in capsys.readouterr().err


def test_a_rule_that_draws_takes_cuts_without_a_temperature(
    tmp_path: Path, capsys: Capture
) -> None:
    model = str(write_checkpoint(tmp_path / "gemma", "diffusion-gemma", seed=3))
    words = ["generate", "5 7", "-m", model, "-n", "8", "--block", "8"]
    texts = []
    for cut in ([], ["--top-k", "1"], ["--top-p", "0.2"]):
        assert run([*words, *cut]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] not in texts[1:]
