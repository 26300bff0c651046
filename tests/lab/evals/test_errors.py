"""No error is an answer: it ends the run, and the same command gives the undisturbed result."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from offload_cases import PROMPT, load_engine, needs_kernels, packed_checkpoint
from tiny_task import make_quiz

import coterie
from coterie.cli.entry import run
from coterie.engine.engine import Engine
from coterie.errors import (
    CheckpointError,
    CoterieError,
    NonFiniteLogitsError,
    OffloadError,
    TokenizerError,
)
from coterie.keys import to_json
from coterie.lab.evals import answer_log
from coterie.lab.evals.results import EvalResult
from coterie.lab.evals.run import Variant, run_eval
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.simulated_store import SimulatedCacheStore
from coterie.testing import write_checkpoint

QUIZ = make_quiz(count=2, tokens=6)
STEPS: dict[str, Any] = {"block": 8, "unmask": "fixed:steps=4"}
VARIANTS = [Variant("vanilla"), Variant("des-vote:beta=0.5")]
ERRORS: list[Exception] = [
    OSError(errno.EIO, "Input/output error"),
    OffloadError("expert 3 of layer 1 cannot be read"),
    CheckpointError("the file was changed"),
    MemoryError("out of memory"),
    RuntimeError("a bug"),
]
Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("embedded_once")
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


def fail_once(
    monkeypatch: pytest.MonkeyPatch, store: type, error: Exception, after: int
) -> Callable[[], int]:
    """``serve`` raises ``error`` at the call after so many; returns the number of calls so far."""
    serve, calls = store.serve, 0

    def failing(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise error
        return serve(self, *arguments)

    monkeypatch.setattr(store, "serve", failing)
    return lambda: calls


def stored(folder: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (folder / "items.jsonl").read_text().splitlines()))


def documents(results: list[EvalResult]) -> list[dict[str, Any]]:
    """All answers, without times."""
    answers = [to_json(answer) for result in results for answer in result.answers]
    for answer in answers:
        answer["seconds"] = 0.0
        if answer["served"] is not None:
            answer["served"]["waited"] = 0.0
    return answers


@cache
def engine() -> Engine:
    """A packed model with room for 3 of 16 experts a layer."""
    return load_engine(packed_checkpoint(Path(mkdtemp())), "3", **STEPS)


@cache
def expected_documents() -> list[dict[str, Any]]:
    return documents(run_eval(engine(), [QUIZ], VARIANTS, None, batch_size=1))


@needs_kernels
@each_error
def test_the_engine_raises_the_error_itself_and_continues(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12}
    expected = engine().generate(PROMPT, **options).tokens
    fail_once(monkeypatch, CachedExpertStore, error, after=9)
    with pytest.raises(type(error)) as raised:
        engine().generate(PROMPT, **options)
    assert raised.value is error
    assert not isinstance(raised.value, NonFiniteLogitsError)
    assert engine().generate(PROMPT, **options).tokens == expected


@needs_kernels
@pytest.mark.parametrize(("error", "after"), list(zip(ERRORS[::2], [0, 9, 25], strict=True)))
def test_an_evaluation_ends_and_continues_to_the_undisturbed_result(
    error: Exception, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_documents()
    calls = fail_once(monkeypatch, CachedExpertStore, error, after)
    with pytest.raises(type(error)):
        run_eval(engine(), [QUIZ], VARIANTS, tmp_path, batch_size=1)
    assert calls() == after + 1
    finished = stored(tmp_path)
    assert len(finished) < len(expected)
    assert all(answer["error"] is None for answer in finished)
    again = run_eval(engine(), [QUIZ], VARIANTS, tmp_path, batch_size=1)
    assert documents(again) == expected


@pytest.mark.parametrize("error", ERRORS[::4], ids=lambda error: type(error).__name__)
def test_eval_ends_with_status_2_and_the_same_command_continues(
    error: Exception, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        *("eval", "--task", "words", "--num-problems", "2", "-n", "32"),
        *("--simulate-expert-memory", "35%", "-o", str(tmp_path)),
    ]
    with monkeypatch.context() as patch:
        fail_once(patch, SimulatedCacheStore, error, after=14)
        assert run(command) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(error.args[-1]) in printed.err.splitlines()[-1]
    assert ("same command continues" in printed.err) == bool(stored(tmp_path))
    assert all(answer["error"] is None for answer in stored(tmp_path))
    assert run([*command, "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["policies"][0]
    assert accuracy["failed"] == 0


@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda error: type(error).__name__)
def test_generate_ends_with_status_2(
    error: Exception, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, SimulatedCacheStore, error, after=6)
    assert run(["generate", "x", "-n", "32", "--simulate-expert-memory", "35%"]) == 2
    assert str(error.args[-1]) in capsys.readouterr().err


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("harm", [Path.unlink, rewrite])
def test_weights_that_change_end_the_run(harm: Callable[[Path], object], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llada2", seed=3)
    weights = folder / "model.safetensors"
    expected = documents(
        run_eval(coterie.load(folder, **STEPS), [QUIZ], VARIANTS, None, batch_size=1)
    )
    content, asked = weights.read_bytes(), list[str]()

    def on_answer(answer: answer_log.Answer) -> None:
        asked.append(answer.id)
        if len(asked) == 2:
            harm(weights)

    with pytest.raises((CoterieError, OSError), match=r"model\.safetensors"):
        run_eval(
            coterie.load(folder, **STEPS), [QUIZ], VARIANTS, tmp_path / "run", batch_size=1,
            on_answer=on_answer,
        )  # fmt: skip
    assert len(stored(tmp_path / "run")) == 2
    weights.write_bytes(content)
    again = run_eval(
        coterie.load(folder, **STEPS), [QUIZ], VARIANTS, tmp_path / "run", batch_size=1
    )
    assert documents(again) == expected


def test_errors_of_earlier_versions_are_asked_again_unless_logits_were_not_finite(
    tmp_path: Path,
) -> None:
    engine = coterie.load(write_checkpoint(tmp_path / "model", "llada2", seed=3), block=8)
    folder, quiz = tmp_path / "run", make_quiz(count=4)
    expected = documents(run_eval(engine, [quiz], VARIANTS[:1], folder, batch_size=1))
    answers = stored(folder)
    failed = {"correct": False, "finish": "error", "output": ""}
    answers[1] |= {**failed, "error": "layer 2: packed.safetensors: No such file or directory"}
    answers[2] |= {
        **failed,
        "error": "layer 3 returned NaN or infinite values; no token was written",
    }
    (folder / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    asked: list[str] = []
    for again in (["quiz/1"], []):
        asked.clear()
        (result,) = run_eval(
            engine, [quiz], VARIANTS[:1], folder, batch_size=1,
            on_answer=lambda answer: None if answer.from_disk else asked.append(answer.id),
        )  # fmt: skip
        assert asked == again
        assert documents([result])[1] == expected[1]
        assert result.answers[2].error is not None


@pytest.mark.parametrize("question", ["1 2 9999", "\udcff", ""])
def test_an_unreadable_prompt_fails_its_item_only(question: str, tmp_path: Path) -> None:
    odd = make_quiz(count=3, tokens=8, odd={1: question})
    model = coterie.load(write_checkpoint(tmp_path / "model", "llada2"), **STEPS)
    [result] = run_eval(model, [odd], VARIANTS[:1], tmp_path / "run", batch_size=2)
    errors = [answer.error for answer in result.answers]
    assert [bool(error) for error in errors].count(True) == 1
    assert all(answer.is_final for answer in result.answers)
    assert run_eval(model, [odd], VARIANTS[:1], tmp_path / "run", batch_size=2)[0].errors


def test_an_answer_that_cannot_be_decoded_fails_its_item_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiz = make_quiz(count=4, tokens=8)
    model = coterie.load(write_checkpoint(tmp_path / "model", "llada2"), **STEPS)
    [expected] = run_eval(model, [quiz], VARIANTS[:1], None, batch_size=2)
    decode, calls = type(model.model.tokenizer).decode, 0

    def failing(self: Any, ids: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise TokenizerError("the tokenizer fails")
        return decode(self, ids)

    monkeypatch.setattr(type(model.model.tokenizer), "decode", failing)
    [result] = run_eval(model, [quiz], VARIANTS[:1], None, batch_size=2)
    failed = [answer.key for answer in result.answers if answer.error]
    assert len(failed) == 1
    outputs = {answer.key: answer.output for answer in expected.answers}
    assert all(a.output == outputs[a.key] for a in result.answers if a.key not in failed)
    assert not model.rows
