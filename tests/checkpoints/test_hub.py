"""A hub that does not answer ends in an error after a note, not in silence."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from huggingface_hub.utils import get_session

from coterie.checkpoints import hub
from coterie.checkpoints.hub import hub_requests
from coterie.checkpoints.source import find_folder
from coterie.errors import CheckpointError


@pytest.fixture
def mute_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_request_without_an_answer_ends(
    mute_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*_: object, **__: object) -> str:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        note.wait(10)
        return get_session().get(mute_server, timeout=None).text

    note = threading.Event()
    print_note = hub._print_note
    monkeypatch.setattr(hub, "_print_note", lambda text: (print_note(text), note.set()))
    monkeypatch.setattr(hub, "REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(hub, "NOTE_SECONDS", 0.0)
    monkeypatch.setattr("coterie.checkpoints.hub.snapshot_download", ask)
    with pytest.raises(CheckpointError, match=r"download from the hub failed .*Timeout"):
        find_folder("owner/model")
    assert capsys.readouterr().err == "coterie: asking the hub for owner/model ...\n"


def test_an_answer_in_time_needs_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    hooks, level = get_session().event_hooks, logging.getLogger("huggingface_hub").level
    with hub_requests("owner/model"):
        assert get_session().event_hooks != hooks
    assert get_session().event_hooks == hooks
    assert logging.getLogger("huggingface_hub").level == level
    assert capsys.readouterr().err == ""
