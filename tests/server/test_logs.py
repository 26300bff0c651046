"""Log lines: each is one JSON object, whatever is logged."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.server.logs import FIELDS, JsonFormatter, configure_logs


def line(message: str, **extra: object) -> str:
    record = logging.LogRecord("coterie.server", logging.INFO, "", 0, message, (), None)
    vars(record).update(extra)
    return JsonFormatter().format(record)


@given(st.text(), st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_any_record_is_one_line(message: str, fields: dict[str, object]) -> None:
    written = line(message, **{FIELDS: fields, "request_id": "r1"})
    assert len(written.splitlines()) == 1
    content = json.loads(written)
    assert content["request_id"] == "r1"
    assert fields.items() <= content.items() or not fields.keys().isdisjoint(
        ("time", "level", "logger", "message", "request_id")
    )


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("a fault")
    except ValueError as error:
        written = line("failed", exc_info=(type(error), error, error.__traceback__))
    assert "a fault" in json.loads(written)["traceback"]


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("coterie.server")
    before = logger.handlers, logger.propagate, logger.level
    try:
        configure_logs()
        logger.info("hello", extra={FIELDS: {"port": 1}})
        logger.debug("quiet")
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
    (written,) = capsys.readouterr().err.splitlines()
    assert json.loads(written)["port"] == 1
