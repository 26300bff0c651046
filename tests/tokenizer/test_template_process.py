"""Templates run in a process with limits: none hangs, fills the memory or ends the program."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import TokenizerError
from coterie.tokenizer.chat_template import ChatTemplate
from coterie.tokenizer.template_process import RENDERER, TemplateProcess

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def refusal(source: str) -> str:
    with pytest.raises(TokenizerError, match="template: the chat template fails") as raised:
        ChatTemplate(source, "template", {}).render(MESSAGES)
    assert len(str(raised.value)) < 500
    return str(raised.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(s='xx') %}{% for i in range(40) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x' * 10**8 }}",
    ],
)
def test_a_template_without_measure_is_an_error(source: str) -> None:
    assert any(word in refusal(source) for word in ("memory", "characters"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'word'|truncate(0, true, '', -5) }}", "AssertionError"),
        ("{% for a in [1] %}" * 100 + "{% endfor %}" * 100, "indentation"),
        ("{{ " + "(" * 50_000, "recursion"),
        ("{{ ''.__class__.__mro__[1] }}", "unsafe"),
        (
            "{{ ('{0.__init__.__globals__[os].environ[HOME]}'|attr('format'))(cycler) }}",
            "unsafe",
        ),
        ("{{ raise_exception('\x1b]0;title\x07') }}", r"\x1b]0;title\x07"),
    ],
)
def test_each_kind_of_failure_is_one_of_ours(source: str, problem: str) -> None:
    assert problem in refusal(source)


@given(source=st.text("{%}#' ~*+-|.()[]0123456789abfors=", max_size=60))
def test_any_template_renders_or_is_an_error(source: str) -> None:
    try:
        text = ChatTemplate(source, "template", {}).render(MESSAGES)
    except TokenizerError:
        return
    assert isinstance(text, str)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "{% for i in range(99999) %}" * 2 + "x" * 1000 + "{% endfor %}" * 2,
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
        "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{{ 7 ** 7 ** 9 ** 9 }}",
    ],
)
def test_a_template_without_end_is_ended(source: str) -> None:
    assert "too much time" in refusal(source)


def test_time_runs_out(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the alarm of the child: it ends, and the next template gets a new one."""
    assert process.render("{{ x }}", {"x": 1}) == "1"
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGPROF)
    with pytest.raises(TokenizerError, match="too much time or memory"):
        process.render("{{ x }}", {"x": 2})
    assert process.render("{{ x }}", {"x": 3}) == "3"


def test_an_interrupted_render_leaves_no_answer_for_the_next(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("coterie.tokenizer.template_process._exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.render("{{ x }}", {"x": 1})
    assert process.render("{{ x }}", {"x": 2}) == "2"


def test_a_fork_renders_in_a_child_of_its_own() -> None:
    assert RENDERER.render("{{ x }}", {"x": 1}) == "1"
    owner = RENDERER._owner
    RENDERER._owner = -1  # as in a fork
    child = RENDERER._process
    try:
        assert RENDERER.render("{{ x }}", {"x": 2}) == "2"
        assert RENDERER._process is not child
    finally:
        RENDERER.close()
        RENDERER._process, RENDERER._owner = child, owner


def test_the_environment_of_the_program_is_not_that_of_a_template(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    process.render("", {})
    assert process._process is not None
    with open(f"/proc/{process._process.pid}/environ", "rb") as environment:
        assert b"secret" not in environment.read()


def test_what_transformers_adds_to_jinja_is_there() -> None:
    source = "{% generation %}a{% endgeneration %}{{ messages|tojson(ensure_ascii=False) }}"
    text = ChatTemplate(source, "template", {}).render([{"role": "user", "content": "<ü>"}])
    assert text == 'a[{"role": "user", "content": "<ü>"}]'
