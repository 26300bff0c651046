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
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from process_killer import VARIANTS, quiz
from tiny_task import make_quiz

import coterie
from coterie.checkpoints.fingerprint import fingerprint
from coterie.errors import CoterieError
from coterie.keys import to_json
from coterie.lab.evals.answer_log import Answer, AnswerLog, AnswerTraffic, answer_from_dict
from coterie.lab.evals.report import summarize
from coterie.lab.evals.run import EvalResult, Variant, run_eval
from coterie.lab.evals.task import Task
from coterie.testing import write_checkpoint

TESTS = Path(__file__).parents[2]
KILLER = TESTS / "support" / "process_killer.py"
STEPS = {"block": 8, "unmask": "fixed:steps=4"}
VANILLA, VOTE = Variant("vanilla"), Variant("des-vote:beta=0.25")
MODELS = TemporaryDirectory()


@cache
def model(family: str = "llada2") -> Path:
    folder = Path(MODELS.name) / family
    write_checkpoint(folder, family, seed=3)
    return folder


@cache
def engine() -> coterie.Engine:
    return coterie.load(model(), **STEPS)


@cache
def complete_run() -> tuple[bytes, bytes]:
    """The two files of an uninterrupted run."""
    with TemporaryDirectory() as folder:
        run_eval(engine(), [make_quiz()], [VANILLA, VOTE], Path(folder), batch_size=3)
        return tuple((Path(folder) / name).read_bytes() for name in ("items.jsonl", "run.json"))  # type: ignore[return-value]


def parse_answers(content: bytes) -> dict[tuple[str, str], dict[str, object]]:
    """Answers by variant and id; fails if one is repeated."""
    answers_by_key = {}
    for line in content.splitlines():
        answer = json.loads(line)
        assert (answer["arm"], answer["id"]) not in answers_by_key
        answers_by_key[answer["arm"], answer["id"]] = comparable(answer)
    return answers_by_key


def comparable(answer: Mapping[str, object]) -> dict[str, object]:
    """Without times, floats rounded: the batch affects their last digits."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in answer.items()
        if name != "seconds"
    }


def read_answers(folder: Path) -> dict[tuple[str, str], dict[str, object]]:
    return parse_answers((folder / "items.jsonl").read_bytes())


@law(4)
@given(st.floats(0, 1))
def test_a_run_truncated_at_any_byte_continues(fraction: float) -> None:
    items, run_config = complete_run()
    remaining = items[: int(fraction * len(items))]
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "items.jsonl").write_bytes(remaining)
        (folder / "run.json").write_bytes(run_config)
        reported: list[Answer] = []
        results = run_eval(
            engine(),
            [make_quiz()],
            [VANILLA, VOTE],
            folder,
            batch_size=3,
            on_answer=reported.append,
        )
        assert read_answers(folder) == parse_answers(items)
        assert (
            (folder / "items.jsonl")
            .read_bytes()
            .startswith(remaining[: remaining.rfind(b"\n") + 1])
        )
    assert [a.from_disk for a in reported] == [True] * remaining.count(b"\n") + [False] * (
        12 - remaining.count(b"\n")
    )
    assert answers_by_key_of(results) == parse_answers(items)


def answers_by_key_of(results: Sequence[EvalResult]) -> dict[tuple[str, str], dict[str, object]]:
    answers = [answer for result in results for answer in result.answers]
    return {(answer.variant, answer.id): comparable(to_json(answer)) for answer in answers}


@pytest.mark.slow
def test_a_run_killed_often_answers_every_item_once(tmp_path: Path) -> None:
    kills = 20
    process = subprocess.run(
        [sys.executable, str(KILLER), str(model()), str(tmp_path), str(kills)],
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS / 'support'}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split().count("killed") >= kills // 2, process.stdout
    expected = run_eval(coterie.load(model(), block=8), [quiz(kills)], VARIANTS, None, batch_size=4)
    assert read_answers(tmp_path) == answers_by_key_of(expected)


CHANGES: Mapping[str, tuple[Callable[[], object], str]] = {
    "limit": (lambda: {"limit": 3}, "`limit` is not set in the folder and 3 in this run;"),
    "order": (lambda: {"shuffle_seed": 1}, "`shuffle_seed` is not set in the folder and 1"),
    "generation": (
        lambda: {"options": {"block": 4}},
        "`block` of task quiz is 8 in the folder and 4",
    ),
    "tokens": (
        lambda: {"options": {"max_new_tokens": 4}},
        "`max_new_tokens` of task quiz is 12 in the folder and 4",
    ),
    "settings": (
        lambda: {"tasks": [make_quiz(note="x")]},
        '`note` of task quiz is "" in the folder and "x"',
    ),
    "question": (
        lambda: {"tasks": [make_quiz(odd={2: "1 2"})]},
        "the content of the questions of task quiz differs",
    ),
    "task": (
        lambda: {"tasks": [make_quiz(), make_quiz("other")]},
        "task other is not set in the folder",
    ),
    "model": (lambda: {"engine": coterie.load(model("sdar-moe"), **STEPS)}, "the model differs"),
    "dtype": (
        lambda: {"engine": coterie.load(model(), dtype="bf16", **STEPS)},
        '"float32" in the folder',
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_with_the_difference(change: str, tmp_path: Path) -> None:
    for name, content in zip(("items.jsonl", "run.json"), complete_run(), strict=True):
        (tmp_path / name).write_bytes(content)
    change_run, message = CHANGES[change]
    arguments = {"engine": engine(), "tasks": [make_quiz()], **change_run()}  # type: ignore[dict-item]
    with pytest.raises(CoterieError, match="holds another run") as raised:
        run_eval(arguments.pop("engine"), arguments.pop("tasks"), [VANILLA], tmp_path, **arguments)
    assert message in str(raised.value)
    assert (tmp_path / "items.jsonl").read_bytes() == complete_run()[0]


def test_a_later_variant_generates_only_its_own_answers(tmp_path: Path) -> None:
    first = run_eval(engine(), [make_quiz()], [VANILLA, VOTE], tmp_path)
    before = (tmp_path / "items.jsonl").read_bytes()
    variant = Variant("des-vote:beta=0.25", {"block": 4})
    reported: list[Answer] = []
    results = run_eval(
        engine(), [make_quiz()], [VANILLA, variant], tmp_path, on_answer=reported.append
    )
    assert variant.name == "des-vote:beta=0.25 block=4"
    assert [a.variant for a in reported if not a.from_disk] == [variant.name] * 6
    assert [a.variant for a in reported if a.from_disk] == ["vanilla"] * 6
    assert (tmp_path / "items.jsonl").read_bytes().startswith(before)
    assert results[0] == first[0]
    alone = run_eval(coterie.load(model(), **STEPS | {"block": 4}), [make_quiz()], [VOTE], None)
    assert [a.output for a in results[1].answers] == [a.output for a in alone[0].answers]


@given(st.integers(0, 2**32), st.integers(1, 8))
@law(4)
def test_a_limit_takes_the_first_items_of_the_seeds_order(seed: int, limit: int) -> None:
    def ids(*tasks: Task, **arguments: int) -> list[str]:
        (result,) = run_eval(engine(), tasks, [VANILLA], None, **arguments)
        return [answer.id for answer in result.answers]

    quiz, other = make_quiz(count=8, tokens=1), make_quiz("other", 2, tokens=1)
    shuffled = ids(quiz, shuffle_seed=seed)
    assert sorted(shuffled) == ids(quiz) == [item.id for item in quiz.items()]
    assert ids(quiz, shuffle_seed=seed, limit=limit) == shuffled[:limit]
    assert ids(other, quiz, shuffle_seed=seed, limit=limit)[min(limit, 2) :] == shuffled[:limit]
    assert ids(quiz, limit=limit) == [item.id for item in quiz.items()][:limit]


def test_some_seeds_shuffle_differently() -> None:
    orders = {
        tuple(
            a.id
            for a in run_eval(engine(), [make_quiz(tokens=1)], [VANILLA], None, shuffle_seed=s)[
                0
            ].answers
        )
        for s in range(4)
    }
    assert len(orders) > 2


def test_a_folder_is_locked_for_other_processes(tmp_path: Path) -> None:
    with AnswerLog.open(tmp_path, {}), pytest.raises(CoterieError, match="another process"):
        run_eval(engine(), [make_quiz()], [VANILLA], tmp_path)
    run_eval(engine(), [make_quiz()], [VANILLA], tmp_path)


def test_a_full_disk_keeps_the_written_answers(tmp_path: Path) -> None:
    run_eval(engine(), [make_quiz()], [VANILLA], tmp_path / "complete_run")
    size = (tmp_path / "complete_run" / "items.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, hard))
    try:
        with pytest.raises(CoterieError, match=r"File too large.*4 answers"):
            run_eval(engine(), [make_quiz()], [VANILLA], tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(read_answers(tmp_path / "full")) == 4
    assert (tmp_path / "full" / "items.jsonl").read_bytes().endswith(b"}\n")
    run_eval(engine(), [make_quiz()], [VANILLA], tmp_path / "full")
    assert read_answers(tmp_path / "full") == read_answers(tmp_path / "complete_run")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines, lines[0]], "line 13 repeats vanilla quiz quiz/0"),
        (lambda lines: [lines[0], b"{}", *lines[1:]], "line 2 is not an answer"),
        (lambda lines: [lines[0], lines[1][:50], *lines[2:]], "line 2 is not an answer"),
        (lambda lines: [lines[0], bytes(40), *lines[1:]], "line 2 is not an answer"),
        (lambda lines: [b"[" * 10**5, *lines], "line 1 is not an answer"),
        (lambda lines: [b'{"arm": 3}', *lines], "line 1 is not an answer"),
        (lambda lines: [lines[0].replace(b'"vanilla"', b"3"), *lines[1:]], "line 1 is not an"),
    ],
)
def test_a_damaged_file_is_refused_with_the_line(
    damage: Callable[[list[bytes]], list[bytes]], message: str, tmp_path: Path
) -> None:
    items, run_config = complete_run()
    (tmp_path / "run.json").write_bytes(run_config)
    (tmp_path / "items.jsonl").write_bytes(b"\n".join(damage(items.splitlines())) + b"\n")
    with pytest.raises(CoterieError, match=message):
        run_eval(engine(), [make_quiz()], [VANILLA], tmp_path)


@given(st.data())
@law(30)
def test_an_answer_with_a_value_of_another_type_is_none(data: st.DataObject) -> None:
    traffic = AnswerTraffic(used=2, hits=1, bytes_moved=9, bytes_without_cache=9)
    answer = Answer("vanilla", "quiz", "quiz/1", True, None, {}, traffic=traffic)
    whole = to_json(answer)
    assert answer_from_dict(whole) == answer
    key = data.draw(st.sampled_from(sorted(whole)))
    wrong: list[object] = [["x"], [[]], float("nan"), 10**400]
    wrong += [{"used": "x"}] if key == "served" else [] if key == "also" else [{}]
    with pytest.raises(TypeError):
        answer_from_dict({**whole, key: data.draw(st.sampled_from(wrong))})


@pytest.mark.parametrize("content", [None, b"", bytes(40), b"[]", b"{}", b"[" * 10**5, b"\xff"])
def test_answers_without_a_run_file_are_refused(content: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes(complete_run()[0])
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(CoterieError, match=r"run\.json: .*must identify|holds another run"):
        run_eval(engine(), [make_quiz()], [VANILLA], tmp_path)
    assert (tmp_path / "items.jsonl").read_bytes() == complete_run()[0]


@pytest.mark.parametrize(
    "damage", [bytes(100) + b"\n", bytes(100), b"[" * 10**5, b"[]\n", b"{}\n", b'{"arm": "va']
)
def test_a_damaged_last_line_is_dropped_with_a_remark(damage: bytes, tmp_path: Path) -> None:
    items, run_config = complete_run()
    (tmp_path / "run.json").write_bytes(run_config)
    (tmp_path / "items.jsonl").write_bytes(items + damage)
    remarks: list[str] = []
    run_eval(engine(), [make_quiz()], [VANILLA, VOTE], tmp_path, on_remark=remarks.append)
    assert (tmp_path / "items.jsonl").read_bytes() == items
    assert remarks == [f"{tmp_path}/items.jsonl: the damaged last line, 13, is dropped"]


def test_a_power_cut_at_the_first_answer_starts_again(tmp_path: Path) -> None:
    for name in ("items.jsonl", "run.json"):
        (tmp_path / name).write_bytes(bytes(50))
    run_eval(engine(), [make_quiz()], [VANILLA, VOTE], tmp_path, batch_size=3)
    assert read_answers(tmp_path) == parse_answers(complete_run()[0])


def test_nan_logits_fail_only_their_item() -> None:
    broken = coterie.load(model(), **STEPS)
    broken.model.transformer.embedding[77] = torch.nan
    quiz, reported = make_quiz(odd={2: "5 77 3", 4: "77"}), []
    (result,) = run_eval(broken, [quiz], [VANILLA], None, batch_size=4, on_answer=reported.append)
    failed = [answer for answer in result.answers if answer.error]
    assert [answer.id for answer in failed] == ["quiz/2", "quiz/4"]
    assert all("NaN" in (a.error or "") and not a.correct and not a.output for a in failed)
    assert len(reported) == len(result.answers) == 6
    (intact,) = run_eval(engine(), [make_quiz()], [VANILLA], None, batch_size=4)
    others = [i for i in range(6) if i not in (2, 4)]
    assert [result.answers[i].output for i in others] == [intact.answers[i].output for i in others]
    assert (result.num_failed, intact.num_failed, broken.rows) == (2, 0, ())
    assert result.experts == pytest.approx(
        sum(intact.answers[i].experts * intact.answers[i].expert_forwards for i in others)
        / sum(intact.answers[i].expert_forwards for i in others)
    )


def test_answers_are_cut_to_the_room_beside_their_prompt() -> None:
    quiz = make_quiz(odd={1: " ".join(["5"] * 507), 3: " ".join(["5"] * 511)})
    remarks: list[str] = []
    (result,) = run_eval(engine(), [quiz], [VANILLA], None, batch_size=4, on_remark=remarks.append)
    (intact,) = run_eval(engine(), [make_quiz()], [VANILLA], None, batch_size=4)
    assert [a.new_tokens for a in result.answers] == [
        min(a.new_tokens, {1: 5, 3: 1}.get(n, 12)) for n, a in enumerate(intact.answers)
    ]
    assert {a.error for a in result.answers} == {None}
    assert len(remarks) == 1
    assert "task quiz: in 2 of 6 items" in remarks[0]


def test_a_prompt_without_room_has_an_empty_answer() -> None:
    quiz, remarks = make_quiz(odd={1: " ".join(["5"] * 512)}), list[str]()
    (result,) = run_eval(engine(), [quiz], [VANILLA], None, batch_size=4, on_remark=remarks.append)
    full = result.answers[1]
    assert (full.output, full.finish_reason, full.error) == ("", "length", None)
    assert "1 prompts leave no room" in remarks[0]


@pytest.mark.parametrize("prompt", ["95", "7 500", "pen"])
def test_a_prompt_that_the_model_cannot_read_is_a_remark_and_an_error(prompt: str) -> None:
    quiz, remarks = make_quiz(odd={3: prompt}), list[str]()
    (result,) = run_eval(engine(), [quiz], [VANILLA], None, on_remark=remarks.append)
    assert [n for n, answer in enumerate(result.answers) if answer.error] == [3]
    assert "1 prompts cannot be read: quiz/3: " in remarks[0]


def test_a_task_without_a_readable_prompt_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match="no prompt can be read: quiz/0: "):
        run_eval(engine(), [make_quiz(count=1, odd={0: "pen"})], [VANILLA], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_answers_has_a_summary() -> None:
    broken = coterie.load(model(), **STEPS)
    broken.model.transformer.embedding[77] = torch.nan
    (result,) = run_eval(broken, [make_quiz(count=1, odd={0: "77"})], [VANILLA], None)
    (line,) = summarize([result], ["quiz"])
    assert (
        line.accuracy.successes,
        result.num_failed,
        result.experts,
        result.forwards_per_block,
    ) == (
        0,
        1,
        0,
        0,
    )
    json.dumps(line.to_dict(), allow_nan=False)


def test_an_invalid_variant_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for variant in (
        Variant("chess"),
        Variant("vanilla", {"blok": 3}),
        Variant("vanilla", {"max_new_tokens": 999}),
    ):
        with pytest.raises(CoterieError):
            run_eval(engine(), [make_quiz()], [VANILLA, variant], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert engine().rows == ()


def test_options_override_the_task_and_a_variant_overrides_both() -> None:
    eight, four = run_eval(
        engine(), [make_quiz(count=2)], [VANILLA, Variant("vanilla", {"max_new_tokens": 4})], None,
        options={"max_new_tokens": 8, "early_stop": "off"},
    )  # fmt: skip
    assert [a.new_tokens for a in eight.answers] == [8, 8]
    assert [a.new_tokens for a in four.answers] == [4, 4]


def test_batched_answers_equal_single_ones() -> None:
    quiz, other = make_quiz(count=4), make_quiz("other", 2)
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


def test_only_counted_forwards_have_weight() -> None:
    dual = coterie.load(model("llada-moe"), kv_cache="dual", **STEPS)
    (result,) = run_eval(dual, [make_quiz(tokens=16)], [VOTE], None, batch_size=4)
    answers = result.answers
    assert all(0 < a.expert_forwards < a.forwards for a in answers)  # a re-forward at each block
    assert min(a.experts for a in answers) <= result.experts <= 4
    weighed = sum(a.experts * a.expert_forwards for a in answers)
    assert result.experts == pytest.approx(weighed / sum(a.expert_forwards for a in answers))
    (single,) = run_eval(
        dual, [make_quiz()], [Variant(VOTE.policy, {"unmask": "threshold:p=1e-9"})], None
    )
    assert (single.experts, single.vote_mass_kept, single.forwards_per_block) == (0.0, 1.0, 1.0)


def test_background_grading_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow, reported = make_quiz(count=9, pause=0.02), []
    expected = run_eval(engine(), [make_quiz(count=9)], [VANILLA, VOTE], None, batch_size=3)
    monkeypatch.setattr("coterie.lab.evals.run._grades_in_background", lambda _: True)
    results = run_eval(
        engine(), [slow], [VANILLA, VOTE], tmp_path, batch_size=3, on_answer=reported.append
    )
    assert answers_by_key_of(results) == answers_by_key_of(expected) == read_answers(tmp_path)
    assert len(reported) == 18


def test_a_task_without_items_is_refused_at_once() -> None:
    with pytest.raises(CoterieError, match="task other has no items"):
        run_eval(engine(), [make_quiz(), make_quiz("other", 0)], [VANILLA], None)


def test_seconds_add_up_to_the_variants_time() -> None:
    results: list[EvalResult] = run_eval(
        engine(), [make_quiz(count=9)], [VANILLA, VOTE], None, batch_size=2
    )
    for result in results:
        assert result.seconds > 0
        tokens = sum(a.new_tokens for a in result.answers)
        assert result.tokens_per_second == pytest.approx(tokens / result.seconds)


def test_a_model_is_identified_by_its_content(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model(), tmp_path / "elsewhere"))
    known = fingerprint(copied)
    assert known == fingerprint(model())
    config = copied / "config.json"
    config.write_text(config.read_text().replace("10000.0", "10001.0"))
    change_run = fingerprint(copied)
    assert change_run != known
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)
    assert fingerprint(copied) not in (known, change_run)
