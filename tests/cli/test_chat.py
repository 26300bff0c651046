"""``coterie chat``: turns, commands, interrupts, and a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event as Flag
from threading import main_thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.cli.chat import Conversation
from coterie.cli.entry import run
from coterie.engine.engine import Engine, load
from coterie.testing import write_checkpoint

Capture = pytest.CaptureFixture[str]
OPTIONS: dict[str, object] = {"block": 8, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaDA2 without a tokenizer: text is token ids."""
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny"), "llada2", seed=3))


@pytest.fixture(scope="module")
def reference(model: str) -> Engine:
    return load(model)


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return run(["chat", *words])


questions = st.lists(st.integers(0, 90), min_size=1, max_size=20).map(
    lambda ids: " ".join(map(str, ids))
)
steps = st.one_of(
    st.tuples(st.just("ask"), questions, st.integers(0, 9)),
    st.tuples(st.just("policy"), st.sampled_from(["vanilla", "des-vote:beta=0.3"]), st.just(0)),
    st.tuples(st.just("reset"), st.just(""), st.just(0)),
)


@given(script=st.lists(steps, min_size=1, max_size=5), patience=st.integers(0, 3))
@law(8)
def test_every_answer_is_that_of_the_whole_conversation(
    model: str, reference: Engine, script: list[tuple[str, str, int]], patience: int
) -> None:
    host = load(model, prefix_cache_bytes=1 << 20)
    conversation = Conversation(host, "vanilla", OPTIONS)
    for kind, text, interrupt_after in script:
        if kind == "policy":
            conversation.set_policy(text)
        if kind == "reset":
            conversation.turns = []
        if kind != "ask":
            continue
        before, flag, answer = list(conversation.turns), Flag(), ""
        asked = [*before, {"role": "user", "content": text}]
        if patience == interrupt_after == 0:
            flag.set()
        for count, part in enumerate(conversation.answer(text, flag)):
            answer += part
            if interrupt_after and count == interrupt_after + patience:
                flag.set()
        ids = reference.model.tokenizer.encode_chat(asked)
        whole = reference.generate(ids, policy=conversation.policy, **OPTIONS)  # type: ignore[arg-type]
        assert answer == whole.text if not flag.is_set() else whole.text.startswith(answer)
        answered = [*asked, {"role": "assistant", "content": answer}]
        assert conversation.turns == (answered if answer else before)
        assert host.rows == ()


def test_a_pipe_gets_one_answer_for_each_line(
    model: str, reference: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = f"5 17\n\n/policy des-vote:beta=0.3\n7 8\n/save {saved}\n/policy\n/reset\n5 17\n"
    assert talk(monkeypatch, lines, "-m", model, "-n", "20", "--block", "8") == 0
    printed = capsys.readouterr()
    first = reference.generate([5, 17], **OPTIONS).text  # type: ignore[call-overload]
    ids = [5, 17, *map(int, first.split()), 7, 8]
    second, again = (
        reference.generate(prompt, policy="des-vote:beta=0.3", **OPTIONS).text  # type: ignore[call-overload]
        for prompt in (ids, [5, 17])
    )
    assert printed.out.splitlines() == [first, second, "des-vote:beta=0.3", again]
    assert printed.err == ""
    document = json.loads(saved.read_text())
    assert (document["model"], document["policy"]) == (model, "des-vote:beta=0.3")
    assert [turn["role"] for turn in document["messages"]] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in document["messages"]] == ["5 17", first, "7 8", second]


def test_a_system_turn_comes_first(model: str, reference: Engine) -> None:
    system = {"role": "system", "content": "3 4"}
    conversation = Conversation(load(model), "vanilla", OPTIONS, [system])
    for _ in range(2):
        text = "".join(conversation.answer("5 17", Flag()))
        assert text == reference.generate([3, 4, 5, 17], **OPTIONS).text  # type: ignore[call-overload]
        assert conversation.turns[0] == system
        conversation.turns = []


def test_stats_say_what_was_used_again(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = f"{'5 ' * 20}\n7 8\n/stats\n/quit\n9\n"
    assert talk(monkeypatch, lines, "-m", model, "-n", "20", "--block", "8") == 0
    out = capsys.readouterr().out
    assert "2 questions" in out
    # Of 20 + 20 + 2 tokens, the last block of the first answer was not committed.
    assert "keys of 32 of 42 prompt tokens" in out
    assert len(out.splitlines()) == 2 + 4


@pytest.mark.parametrize(
    "case",
    [
        ("/policy des-vite", "des-vite"),
        ("/save", "/save"),
        ("/save {folder}", "folder"),
        ("/dance 3", "/dance"),
        ("96", "96"),
        (" ".join(["3"] * 512), "/reset"),
    ],
)
def test_a_bad_line_is_refused(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
    case: tuple[str, str],
) -> None:
    line, words = case[0].format(folder=tmp_path), case[1]
    assert talk(monkeypatch, f"{line}\n", "-m", model, "-n", "20", "--block", "8") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_long_conversation_gets_what_fits(model: str) -> None:
    conversation = Conversation(load(model), "vanilla", OPTIONS)
    text = "".join(conversation.answer(" ".join(["3"] * 500), Flag()))
    assert 0 < len(text.split()) <= 12


class Terminal:
    """A user of a pseudo-terminal, in a thread; ``with`` gives the program its other end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.screen, self.end = pty.openpty()
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            stream = open(self.end, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            monkeypatch.setattr(sys, name, stream)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def interrupt(self) -> None:
        """What Ctrl-C does: the signal comes to the thread that reads or answers."""
        signal.pthread_kill(main_thread().ident, signal.SIGINT)

    def interrupt_line(self) -> None:
        """Ctrl-C until the line is dropped: before the read blocks, Python only notes a signal."""
        while not select.select([self.screen], [], [], 0.5)[0]:
            self.interrupt()

    def until(self, pattern: str) -> str:
        """What is shown up to the first match."""
        shown = ""
        while not re.search(pattern, shown):
            assert select.select([self.screen], [], [], 60)[0], f"no {pattern!r} in {shown!r}"
            shown += os.read(self.screen, 4096).decode("utf-8", "replace")
        return shown

    def close(self) -> None:
        os.close(self.end)
        os.close(self.screen)


def test_an_interrupt_keeps_final_text_and_the_terminal_goes_on(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ["-n", "480", "--block", "8", "--unmask", "sequential:steps=8", "--early-stop", "off"]
    terminal = Terminal(monkeypatch)

    def talk() -> None:
        try:
            terminal.until("> ")
            terminal.type("5 17\n")
            terminal.until(r"17\r?\n.*\d+ \d+ ")
            terminal.interrupt()
            terminal.until(r"stopped; \d+ tokens")
            terminal.type("/save /dev/null\n")
            terminal.until("coterie: .*null")
            terminal.type("/stats\n")
            assert "1 questions" in terminal.until("(?s)prefix cache.*> ")
            terminal.interrupt_line()
            terminal.until("> ")
        finally:
            terminal.type("\x04")

    with ThreadPoolExecutor(1) as pool:
        user = pool.submit(talk)
        assert run(["chat", "-m", model, *slow]) == 0
        user.result()
    terminal.close()
