"""Evaluations: items, stored answers, and runs that continue after an interrupt."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_killer import QUIZ, VARIANTS
from tiny_task import Quiz

import coterie
from coterie.checkpoints.fingerprint import fingerprint
from coterie.errors import CoterieError
from coterie.keys import to_json
from coterie.lab.evals.answer_log import Answer, AnswerLog
from coterie.lab.evals.report import summarize
from coterie.lab.evals.run import EvalResult, Variant, run_eval
from coterie.testing import write_checkpoint

TESTS = Path(__file__).parents[2]
KILLER = TESTS / "support" / "process_killer.py"
VANILLA, VOTE = Variant("vanilla"), Variant("des-vote:beta=0.25")
KEEP = TemporaryDirectory()


@cache
def model(family: str = "llada2") -> Path:
    folder = Path(KEEP.name) / family
    write_checkpoint(folder, family, seed=3)
    return folder


@cache
def engine() -> coterie.Engine:
    return coterie.load(model(), block=8)


@cache
def whole() -> tuple[bytes, bytes]:
    """The two files of an uninterrupted run."""
    with TemporaryDirectory() as folder:
        run_eval(engine(), [Quiz()], [VANILLA, VOTE], Path(folder), batch_size=3)
        return tuple((Path(folder) / name).read_bytes() for name in ("items.jsonl", "run.json"))  # type: ignore[return-value]


def parsed(content: bytes) -> dict[tuple[str, str], dict[str, object]]:
    """Lines by arm and id, comparable; fails where one is there twice."""
    found = {}
    for line in content.splitlines():
        answer = json.loads(line)
        assert (answer["arm"], answer["id"]) not in found
        found[answer["arm"], answer["id"]] = comparable(answer)
    return found


def comparable(answer: Mapping[str, object]) -> dict[str, object]:
    """Without the time it took; who shared a forward shows in a float's last digits."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in answer.items()
        if name != "seconds"
    }


def answered(folder: Path) -> dict[tuple[str, str], dict[str, object]]:
    return parsed((folder / "items.jsonl").read_bytes())


@settings(max_examples=12)
@given(st.floats(0, 1))
def test_a_run_cut_off_at_any_byte_goes_on_as_if_it_never_had(share: float) -> None:
    items, about = whole()
    left = items[: int(share * len(items))]
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "items.jsonl").write_bytes(left)
        (folder / "run.json").write_bytes(about)
        heard: list[Answer] = []
        sheets = run_eval(
            engine(), [Quiz()], [VANILLA, VOTE], folder, batch_size=3, on_answer=heard.append
        )
        assert answered(folder) == parsed(items)
        assert (folder / "items.jsonl").read_bytes().startswith(left[: left.rfind(b"\n") + 1])
    assert [a.from_disk for a in heard] == [True] * left.count(b"\n") + [False] * (
        12 - left.count(b"\n")
    )
    expected = run_eval(engine(), [Quiz()], [VANILLA, VOTE], None, batch_size=3)
    assert sheets_of(sheets) == sheets_of(expected)


def sheets_of(sheets: Sequence[EvalResult]) -> dict[tuple[str, str], dict[str, object]]:
    answers = [answer for sheet in sheets for answer in sheet.answers]
    return {(answer.variant, answer.id): comparable(to_json(answer)) for answer in answers}


def kill(folder: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, str(KILLER), str(model()), str(folder), str(kills)],
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS / 'support'}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("killed") >= kills // 2, done.stdout
    expected = run_eval(coterie.load(model()), [QUIZ], VARIANTS, None, batch_size=4)
    assert answered(folder) == sheets_of(expected)


def test_a_run_that_is_killed_again_and_again_answers_every_item_once(tmp_path: Path) -> None:
    kill(tmp_path, 4)


@pytest.mark.slow
def test_a_run_that_is_killed_very_often_answers_every_item_once(tmp_path: Path) -> None:
    kill(tmp_path, 20)


CHANGES: Mapping[str, tuple[Callable[[], object], str]] = {
    "limit": (lambda: {"limit": 3}, "limit is not set in the folder and 3 in this run"),
    "order": (lambda: {"shuffle_seed": 1}, "shuffle_seed is not set in the folder and 1"),
    "generation": (lambda: {"options": {"block": 4}}, "generation.block is 8 in the folder and 4"),
    "tokens": (
        lambda: {"options": {"max_new_tokens": 4}},
        "max_new_tokens is 12 in the folder and 4",
    ),
    "settings": (lambda: {"tasks": [Quiz(note="x")]}, 'settings.note is "" in the folder and "x"'),
    "question": (lambda: {"tasks": [Quiz(odd={2: "1 2"})]}, "tasks.quiz.questions is"),
    "task": (lambda: {"tasks": [Quiz(), Quiz("other")]}, "tasks.other is not set in the folder"),
    "model": (lambda: {"engine": coterie.load(model("sdar-moe"), block=8)}, "model is"),
    "dtype": (
        lambda: {"engine": coterie.load(model(), dtype="bf16", block=8)},
        '"float32" in the folder',
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_by_what_differs(change: str, tmp_path: Path) -> None:
    for name, content in zip(("items.jsonl", "run.json"), whole(), strict=True):
        (tmp_path / name).write_bytes(content)
    changed, told = CHANGES[change]
    asked = {"engine": engine(), "tasks": [Quiz()], **changed()}  # type: ignore[dict-item]
    with pytest.raises(CoterieError, match="holds another run") as raised:
        run_eval(asked.pop("engine"), asked.pop("tasks"), [VANILLA], tmp_path, **asked)
    assert told in str(raised.value)
    assert (tmp_path / "items.jsonl").read_bytes() == whole()[0]


def test_an_arm_may_come_later_and_asks_only_for_itself(tmp_path: Path) -> None:
    first = run_eval(engine(), [Quiz()], [VANILLA, VOTE], tmp_path)
    before = (tmp_path / "items.jsonl").read_bytes()
    own = Variant("des-vote:beta=0.25", {"block": 4})
    heard: list[Answer] = []
    sheets = run_eval(engine(), [Quiz()], [VANILLA, own], tmp_path, on_answer=heard.append)
    assert own.name == "des-vote:beta=0.25 block=4"
    assert [a.variant for a in heard if not a.from_disk] == [own.name] * 6
    assert [a.variant for a in heard if a.from_disk] == ["vanilla"] * 6
    assert (tmp_path / "items.jsonl").read_bytes().startswith(before)
    assert sheets[0] == first[0]
    alone = run_eval(coterie.load(model(), block=4), [Quiz()], [VOTE], None)
    assert [a.output for a in sheets[1].answers] == [a.output for a in alone[0].answers]


@given(st.integers(0, 2**32), st.integers(1, 8))
@settings(max_examples=20)
def test_a_limit_takes_the_first_of_an_order_that_its_seed_alone_decides(
    seed: int, limit: int
) -> None:
    def ids(*tasks: Quiz, **asked: int) -> list[str]:
        (sheet,) = run_eval(engine(), tasks, [VANILLA], None, **asked)
        return [answer.id for answer in sheet.answers]

    quiz, other = Quiz(count=8, tokens=1), Quiz("other", 2, tokens=1)
    shuffled = ids(quiz, shuffle_seed=seed)
    assert sorted(shuffled) == ids(quiz) == [item.id for item in quiz.items()]
    assert ids(quiz, shuffle_seed=seed, limit=limit) == shuffled[:limit]
    assert ids(other, quiz, shuffle_seed=seed, limit=limit)[min(limit, 2) :] == shuffled[:limit]
    assert ids(quiz, limit=limit) == [item.id for item in quiz.items()][:limit]


def test_some_seeds_shuffle_differently() -> None:
    orders = {
        tuple(
            a.id
            for a in run_eval(engine(), [Quiz(tokens=1)], [VANILLA], None, shuffle_seed=s)[
                0
            ].answers
        )
        for s in range(4)
    }
    assert len(orders) > 2


def test_a_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, {}), pytest.raises(CoterieError, match="another process"):
        run_eval(engine(), [Quiz()], [VANILLA], tmp_path)
    run_eval(engine(), [Quiz()], [VANILLA], tmp_path)


def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path: Path) -> None:
    run_eval(engine(), [Quiz()], [VANILLA], tmp_path / "whole")
    size = (tmp_path / "whole" / "items.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, hard))
    try:
        with pytest.raises(CoterieError, match="File too large; 4 answers"):
            run_eval(engine(), [Quiz()], [VANILLA], tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(answered(tmp_path / "full")) == 4
    assert (tmp_path / "full" / "items.jsonl").read_bytes().endswith(b"}\n")
    run_eval(engine(), [Quiz()], [VANILLA], tmp_path / "full")
    assert answered(tmp_path / "full") == answered(tmp_path / "whole")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda lines: [*lines, lines[0]], "line 13 repeats vanilla quiz quiz/0"),
        (lambda lines: [lines[0], b"{}", *lines[1:]], "line 2 is not an answer"),
        (lambda lines: [lines[0], lines[1][:50], *lines[2:]], "line 2 is not an answer"),
    ],
)
def test_a_spoilt_file_is_refused_by_the_line(
    spoil: Callable[[list[bytes]], list[bytes]], told: str, tmp_path: Path
) -> None:
    items, about = whole()
    (tmp_path / "run.json").write_bytes(about)
    (tmp_path / "items.jsonl").write_bytes(b"\n".join(spoil(items.splitlines())) + b"\n")
    with pytest.raises(CoterieError, match=told):
        run_eval(engine(), [Quiz()], [VANILLA], tmp_path)


def test_answers_without_their_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes(whole()[0])
    with pytest.raises(CoterieError, match="does not identify"):
        run_eval(engine(), [Quiz()], [VANILLA], tmp_path)


def test_blocks_that_a_power_cut_left_empty_are_cut_off(tmp_path: Path) -> None:
    items, about = whole()
    (tmp_path / "run.json").write_bytes(about)
    (tmp_path / "items.jsonl").write_bytes(items + bytes(100) + b"\n")
    run_eval(engine(), [Quiz()], [VANILLA, VOTE], tmp_path)
    assert (tmp_path / "items.jsonl").read_bytes() == items


def test_numbers_that_break_fail_their_own_item_and_no_other() -> None:
    broken = coterie.load(model(), block=8)
    broken.model.transformer.embedding[77] = torch.nan
    quiz, heard = Quiz(odd={2: "5 77 3", 4: "77"}), []
    (sheet,) = run_eval(broken, [quiz], [VANILLA], None, batch_size=4, on_answer=heard.append)
    failed = [answer for answer in sheet.answers if answer.error]
    assert [answer.id for answer in failed] == ["quiz/2", "quiz/4"]
    assert all("NaN" in (a.error or "") and not a.correct and not a.output for a in failed)
    assert len(heard) == len(sheet.answers) == 6
    (sound,) = run_eval(engine(), [Quiz()], [VANILLA], None, batch_size=4)
    others = [i for i in range(6) if i not in (2, 4)]
    assert [sheet.answers[i].output for i in others] == [sound.answers[i].output for i in others]
    assert (sheet.num_failed, sound.num_failed, broken.rows) == (2, 0, ())
    assert sheet.experts == pytest.approx(
        sum(sound.answers[i].experts * sound.answers[i].expert_forwards for i in others)
        / sum(sound.answers[i].expert_forwards for i in others)
    )


def test_prompts_that_do_not_fit_fail_alone() -> None:
    quiz = Quiz(odd={1: " ".join(["5"] * 510), 3: "95", 5: "7 500"})
    (sheet,) = run_eval(engine(), [quiz], [VANILLA], None, batch_size=4)
    errors = {answer.id: answer.error for answer in sheet.answers if answer.error}
    assert list(errors) == ["quiz/1", "quiz/3", "quiz/5"]
    assert "the model has 512" in str(errors["quiz/1"])
    assert "outside the vocabulary" in str(errors["quiz/5"])


def test_a_model_that_answers_nothing_still_has_a_line() -> None:
    (sheet,) = run_eval(engine(), [Quiz(count=1, odd={0: "900"})], [VANILLA], None)
    (line,) = summarize([sheet], ["quiz"])
    assert (line.accuracy.successes, sheet.num_failed, sheet.experts, sheet.forwards_per_block) == (
        0,
        1,
        0,
        0,
    )
    json.dumps(line.to_dict(), allow_nan=False)


def test_an_arm_that_cannot_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for arm in (
        Variant("chess"),
        Variant("vanilla", {"blok": 3}),
        Variant("vanilla", {"max_new_tokens": 999}),
    ):
        with pytest.raises(CoterieError):
            run_eval(engine(), [Quiz()], [VANILLA, arm], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert engine().rows == ()


def test_what_is_asked_beats_the_task_and_an_arm_beats_both() -> None:
    eight, four = run_eval(
        engine(), [Quiz(count=2)], [VANILLA, Variant("vanilla", {"max_new_tokens": 4})], None,
        options={"max_new_tokens": 8, "early_stop": "off"},
    )  # fmt: skip
    assert [a.new_tokens for a in eight.answers] == [8, 8]
    assert [a.new_tokens for a in four.answers] == [4, 4]


def test_rows_decoded_together_answer_as_rows_alone_do() -> None:
    quiz, other = Quiz(count=4), Quiz("other", 2)
    alone, together = (
        run_eval(engine(), [quiz, other], [VOTE], None, batch_size=rows)[0] for rows in (1, 6)
    )
    assert [a.output for a in alone.answers] == [a.output for a in together.answers]
    assert alone.experts == pytest.approx(together.experts)
    assert (len(alone.correct("quiz")), len(alone.correct("other")), len(alone.correct())) == (
        4,
        2,
        6,
    )
    assert alone.other_metrics("quiz")["even"] == [
        a.other_metrics["even"] for a in alone.for_task("quiz")
    ]


def test_only_forwards_that_were_counted_weigh() -> None:
    dual = coterie.load(model("llada-moe"), block=8, plan="dual")
    (sheet,) = run_eval(dual, [Quiz(tokens=16)], [VOTE], None, batch_size=4)
    answers = sheet.answers
    assert all(0 < a.expert_forwards < a.forwards for a in answers)  # a re-forward at each block
    assert min(a.experts for a in answers) <= sheet.experts <= 4
    weighed = sum(a.experts * a.expert_forwards for a in answers)
    assert sheet.experts == pytest.approx(weighed / sum(a.expert_forwards for a in answers))
    (once,) = run_eval(dual, [Quiz()], [Variant(VOTE.policy, {"unmask": "threshold:p=1e-9"})], None)
    assert (once.experts, once.vote_mass_kept, once.forwards_per_block) == (0.0, 1.0, 1.0)


def test_grading_beside_generation_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow, heard = Quiz(count=9, pause=0.02), []
    expected = run_eval(engine(), [Quiz(count=9)], [VANILLA, VOTE], None, batch_size=3)
    monkeypatch.setattr("coterie.lab.evals.run._grades_in_background", lambda _: True)
    sheets = run_eval(
        engine(), [slow], [VANILLA, VOTE], tmp_path, batch_size=3, on_answer=heard.append
    )
    assert sheets_of(sheets) == sheets_of(expected) == answered(tmp_path)
    assert len(heard) == 18


def test_a_task_without_items_is_refused_at_once() -> None:
    with pytest.raises(CoterieError, match="task other has no items"):
        run_eval(engine(), [Quiz(), Quiz("other", 0)], [VANILLA], None)


def test_seconds_add_up_to_the_arms_time() -> None:
    sheets: list[EvalResult] = run_eval(
        engine(), [Quiz(count=9)], [VANILLA, VOTE], None, batch_size=2
    )
    for sheet in sheets:
        assert sheet.seconds > 0
        tokens = sum(a.new_tokens for a in sheet.answers)
        assert sheet.tokens_per_second == pytest.approx(tokens / sheet.seconds)


def test_a_model_is_known_again_by_what_it_holds_and_not_by_where(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model(), tmp_path / "elsewhere"))
    known = fingerprint(copied)
    assert known == fingerprint(model())
    config = copied / "config.json"
    config.write_text(config.read_text().replace("10000.0", "10001.0"))
    changed = fingerprint(copied)
    assert changed != known
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)
    assert fingerprint(copied) not in (known, changed)
