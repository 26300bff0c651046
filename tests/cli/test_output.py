"""What a model or a file says is shown, and never obeyed, by a terminal."""

from __future__ import annotations

import sys

import pytest

from coterie.cli import output
from coterie.cli.live_view import LiveView
from coterie.decoding import Token
from coterie.engine.events import Denoised

TEXT, SHOWN = "a\x1b]0;title\x07\n\tb\x9b31m", "a\\x1b]0;title\\x07\n\tb\\x9b31m"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_no_control_characters(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    output.print_text(TEXT, end="")
    assert capsys.readouterr().out == (SHOWN if is_terminal else TEXT)


def test_a_note_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_note(TEXT)
    assert capsys.readouterr().err == f"coterie: {SHOWN}\n"


def test_the_live_view_has_no_control_characters() -> None:
    view = LiveView("vanilla", lambda _token: TEXT, num_experts=4, moe_layers=(0,))
    view.update(Denoised(row=0, committed=(Token(0, 5, 1.0),)))
    assert view.answer_text().plain == SHOWN
