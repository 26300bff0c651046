"""``coterie train``: a run that is stopped says what it keeps and goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coterie.cli.entry import run
from coterie.lab.training import checkpoint, embedded, vocabulary
from coterie.lab.training.network import NetworkShape


def test_a_stopped_run_says_what_it_keeps_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = vocabulary.build_tokenizer(20)
    monkeypatch.setattr(vocabulary, "build_tokenizer", lambda: tokenizer)
    shape = NetworkShape(hidden_size=16, layers=2, heads=1, kv_heads=1, head_dim=16)
    shape = replace(shape, dense_width=16, experts=16, expert_width=16, k=2)
    monkeypatch.setattr(embedded, "NetworkShape", lambda: shape)
    monkeypatch.setattr(embedded, "FIRST_STAGE", replace(embedded.FIRST_STAGE, rows=2))
    monkeypatch.setattr(embedded, "SECOND_STAGE", embedded.FIRST_STAGE)
    monkeypatch.setattr(embedded, "THIRD_STAGE", embedded.FIRST_STAGE)
    train, steps = checkpoint.train, []

    def stopped(*arguments: object, on_step: Callable[[int], None], **others: object) -> object:
        def stop(step: int) -> None:
            on_step(step)
            steps.append(step)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        return train(*arguments, on_step=stop, **others)

    monkeypatch.setattr(checkpoint, "train", stopped)
    words = ["train", "--out", str(tmp_path), "--steps", "4", "--workers", "1"]
    with pytest.raises(SystemExit) as stop:
        run(words)
    assert stop.value.code == 143
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"coterie: {tmp_path / 'run'} keeps step 2 of 4; the same command goes on"
    )
    assert run(words) == 0
    assert steps == [0, 1, 2, 2, 3, 4]
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    record = json.loads((tmp_path / "embedded-training.json").read_text())
    assert record["facts"]["log"][-1]["step"] == 4


def test_text_without_a_corpus_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--task", "text", "--out", str(tmp_path)]) != 0
    assert "--corpus" in capsys.readouterr().err
