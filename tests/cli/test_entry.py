"""The program: how it ends when its output or its user does, in this process and as a process."""

from __future__ import annotations

import codecs
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from coterie.cli import entry
from coterie.cli.engine_options import EngineOptions
from coterie.cli.entry import run
from coterie.engine.engine import Engine
from coterie.engine.events import Event
from coterie.testing import write_checkpoint

FULL_DISK = "coterie: standard output: No space left on device\n"
TARGET = ("--target", "experts=20")
LIBRARY_WORDS = ("parse", "Input", "sys.set_int")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaDA2 without a tokenizer: text is token ids."""
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny"), "llada2", seed=3))


def command(*words: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "coterie", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        **options,  # type: ignore[call-overload]
    )


def exit_status(stdout: TextIO, monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The status of the whole program, in this process, with another standard output."""
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["coterie", *words])
    monkeypatch.setattr(os, "_exit", sys.exit)  # the program ends, and not this process
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            entry.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    return ended.value.code


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"], ["generate", "5", "-m"]])
def test_a_full_disk_is_one_line(
    capsys: Capture, model: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as full:
        assert exit_status(full, monkeypatch, *words, model) == 2
    assert capsys.readouterr().err == FULL_DISK


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_line_of_a_process(
    model: str, unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with Path("/dev/full").open("w") as full, command("inspect", model, stdout=full) as process:
        assert process.communicate(timeout=300)[1] == FULL_DISK
    assert process.returncode == 2


def test_an_interrupt_during_imports_leaves_no_traceback() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "_coterie", "policies"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": "src"}, cwd=Path(__file__).parents[2],
    ) as process:  # fmt: skip
        assert process.stderr is not None
        next(line for line in process.stderr if "torch" in line)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=300)
    assert (printed[0], "Traceback" in printed[1]) == ("", False)
    assert process.returncode == -signal.SIGINT


def test_a_closed_pipe_ends_quietly(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe:
        assert exit_status(pipe, monkeypatch, "policies") == 1
    assert capsys.readouterr().err == ""


def test_an_interrupt_while_decoding_is_one_line(
    capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Engine.step, []

    def interrupted(engine: Engine) -> list[Event]:
        steps.append(step(engine))
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return steps[-1]

    monkeypatch.setattr(Engine, "step", interrupted)
    assert run(["generate", "5 17 33", "-m", model, "-n", "32", "--block", "8"]) == 130
    assert tuple(capsys.readouterr()) == ("", "coterie: stopped\n")


@pytest.mark.slow
def test_an_interrupt_ends_a_process_with_130_and_no_traceback(tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path, "llada2", vocab_size=300))
    slow = ["--kv-cache", "uncached", "--block", "480", "--unmask", "fixed:steps=480", "-n", "480"]
    with command("generate", "Hi!", "-m", model, *slow, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert "no tokenizer" in process.stderr.readline()  # from here on it decodes
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300) == ("", "coterie: stopped\n")
    assert process.returncode == 130


def test_an_interrupt_before_the_command_runs_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "check_repeats", interrupt)
    assert entry.run(["policies"]) == 130
    assert capsys.readouterr().err == "coterie: stopped\n"


@pytest.mark.parametrize("flag", ["--seed", "-n", "--temperature", "-p", "-m", "--expert-memory"])
@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "x" * 5000, "word " * 1000])
def test_an_endless_value_ends_in_a_short_line(flag: str, value: str, capsys: Capture) -> None:
    assert run(["generate", "5", flag, value]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert len(line) < 1000
    assert not any(word in line for word in LIBRARY_WORDS)


@pytest.mark.parametrize("value", ["1.5", "x", "-1", ""])
def test_a_bad_number_is_told_in_our_words(value: str, capsys: Capture) -> None:
    assert run(["generate", "5", "-n", value]) == 2
    line = capsys.readouterr().err
    assert "must be" in line
    assert not any(word in line for word in LIBRARY_WORDS)


@pytest.mark.parametrize(
    "words", [["generate", "5"], ["eval"], ["trace", "-o", "t"], ["calibrate", "topk", *TARGET]]
)
def test_an_interrupt_before_anything_is_kept_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EngineOptions, "open", interrupt)
    assert run(words) == 130
    assert tuple(capsys.readouterr()) == ("", "coterie: stopped\n")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_byte_order_mark_on_standard_input_is_no_part_of_the_prompt(
    encoding: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    answers = []
    for mark in (b"", codecs.BOM_UTF8):
        stdin = io.TextIOWrapper(io.BytesIO(mark + b"5 17 33\n"), encoding=encoding)
        monkeypatch.setattr(sys, "stdin", stdin)
        with (tmp_path / "answer").open("w") as file:
            assert exit_status(file, monkeypatch, "generate", "-", "-m", model, "-n", "8") == 0
        answers.append((tmp_path / "answer").read_text() + capsys.readouterr().err)
    assert answers[0] == answers[1]
    assert answers[0]


@pytest.mark.parametrize(
    "words", [["generate", "-"], ["compare", "-"], ["chat"], ["grade", "words", "-"]]
)
def test_a_closed_standard_input_is_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("coterie: standard input is closed")
    assert printed.err.count("\n") == 1
