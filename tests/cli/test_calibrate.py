"""``coterie calibrate`` and its file, which ``--policy @file`` reads."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import coterie
from coterie.cli import output
from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.lab.calibration import measurement, read_calibrated_policy
from coterie.testing import write_checkpoint

pytestmark = pytest.mark.usefixtures("embedded_once")

Capture = pytest.CaptureFixture[str]
Change = Callable[[dict], object]

DECODING = ("-n", "8", "--block", "8", "--unmask", "fixed:steps=3")
ENOUGH = {
    "policy": "des-vote:beta=0.25",
    "model": {"name": "tiny", "fingerprint": "", "layers": 2, "experts": 16},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaDA2 with 16 experts and top-4 in two layers, without a tokenizer."""
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny"), "llada2", seed=3))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("asked") / "prompts.txt"
    path.write_text("5 17 33\n6 2 9\n11 4\n")
    return str(path)


@pytest.fixture(scope="module")
def kept(model: str, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a calibration to six experts."""
    path = tmp_path_factory.mktemp("kept") / "six.json"
    words = ("calibrate", "des-vote:vote=weight", "--target", "experts=6", "--prompt-file", prompts)
    assert run([*words, "-m", model, *DECODING, "-o", str(path)]) == 0
    return path


def refusal(capsys: Capture, *words: str) -> str:
    assert run(words) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    return printed.err


def altered(kept: Path, tmp_path: Path, change: Change) -> str:
    content = json.loads(kept.read_text())
    change(content)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    return f"@{path}"


def test_the_file_holds_the_policy_and_its_proof(kept: Path, model: str, prompts: str) -> None:
    record = json.loads(kept.read_text())
    assert record["family"] == "des-vote:beta=?,vote=weight"
    assert (record["target"]["kind"], record["target"]["value"]) == ("experts", 6)
    assert record["achieved"]["value"] <= 6 < record["beyond"]["value"]
    low, high = record["achieved"]["interval"]
    assert low <= record["achieved"]["value"] <= high
    assert record["achieved"]["n"] == record["prompts"]["count"] == 3
    assert record["policy"] in [step["policy"] for step in record["search"]]
    assert (record["model"]["name"], record["model"]["layers"]) == (model, 2)
    assert (record["model"]["experts"], len(record["model"]["fingerprint"])) == (16, 16)
    assert (record["prompts"]["source"], record["generation"]["block"]) == (prompts, 8)
    assert {"command", "commit", "machine", "versions", "when"} <= set(record)


def test_a_policy_option_takes_the_file(capsys: Capture, kept: Path, model: str) -> None:
    record = json.loads(kept.read_text())
    words = ("generate", "5 17 33", "-m", model, *DECODING, "--json", "-p")
    results = []
    for policy in (f"@{kept}", record["policy"]):
        assert run([*words, policy]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        results.append(json.loads(printed.out))
    assert results[0]["policy"] == record["policy"]
    assert results[0]["text"] == results[1]["text"]
    assert run(["compare", "5 17 33", "-m", model, *DECODING, "--json", "-p", f"@{kept}"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert [one["policy"] for one in compared["runs"]] == ["vanilla", record["policy"]]


def test_an_evaluation_takes_the_file(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    words = ("--task", "algebra", "--num-problems", "2", "--json")
    assert run(["calibrate", "topk", "--target", "experts=60", *words, "-o", str(path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert run(["eval", *words, "-p", f"@{path}"]) == 0
    sat = json.loads(capsys.readouterr().out)
    assert [one["policy"] for one in sat["policies"]] == ["vanilla", record["policy"]]


def test_the_table_shows_the_policy_and_its_cost(capsys: Capture, model: str, prompts: str) -> None:
    words = ("calibrate", "topk", "--target", "mass=0.6", "--prompt-file", prompts, "-m", model)
    assert run([*words, *DECODING]) == 0
    printed = capsys.readouterr()
    assert "topk:k=" in printed.out
    assert "meets mass=0.6: vote mass kept" in printed.out
    assert "experts a layer" in printed.out


def test_the_policy_is_for_python_too(kept: Path, model: str) -> None:
    record = read_calibrated_policy(kept)
    engine = coterie.load(model, max_new_tokens=8, block=8, unmask="fixed:steps=3")
    assert record.check_model(engine.model, engine.generation) == []
    [note] = record.check_model(engine.model, engine.generation.replace(skip_settled=2))
    assert "skip_settled=None (now 2)" in note
    assert engine.generate("5 17 33", policy=record.policy).policy == record.policy


def test_another_way_of_decoding_is_remarked(capsys: Capture, kept: Path, model: str) -> None:
    words = ("generate", "5 17 33", "-m", model, *DECODING[:2], "--block", "4", "-p", f"@{kept}")
    assert run([*words, "--unmask", "fixed:steps=3"]) == 0
    assert capsys.readouterr().err == f"coterie: {kept}: calibrated with block=8 (now 4)\n"


def test_experts_of_another_kind_are_remarked(capsys: Capture, kept: Path, model: str) -> None:
    words = ("generate", "5 17 33", "-m", model, *DECODING, "-p", f"@{kept}")
    assert run([*words, "--expert-dtype", "int8"]) == 0
    told = capsys.readouterr().err
    assert told == f"coterie: {kept}: calibrated with experts whole (now int8 in groups of 64)\n"


def test_experts_are_quantised_for_a_calibration(tmp_path: Path, model: str, prompts: str) -> None:
    path = tmp_path / "eight.json"
    words = ("calibrate", "des-vote:vote=weight", "--target", "experts=6", "--prompt-file", prompts)
    assert run([*words, "-m", model, *DECODING, "--expert-dtype", "int8", "-o", str(path)]) == 0
    assert json.loads(path.read_text())["model"]["expert_format"] == "int8 in groups of 64"


def test_other_weights_are_remarked(capsys: Capture, kept: Path, tmp_path: Path) -> None:
    other = str(write_checkpoint(tmp_path, "llada2", seed=4))
    assert run(["generate", "5 17 33", "-m", other, *DECODING, "-p", f"@{kept}"]) == 0
    assert "six.json: calibrated on other weights" in capsys.readouterr().err


@pytest.mark.parametrize("noun", ["layers", "experts"])
def test_other_sizes_are_refused(
    capsys: Capture, kept: Path, model: str, tmp_path: Path, noun: str
) -> None:
    text = altered(kept, tmp_path, lambda content: content["model"].update({noun: 3}))
    printed = refusal(capsys, "generate", "5 17 33", "-m", model, *DECODING, "-p", text)
    assert {"layers": "for 3 routing layers", "experts": "of 3 experts"}[noun] in printed
    assert "has 2 of 16; calibrate again, or give the policy: des-vote:beta=" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a JSON file"),
        ('{"policy": "des-vote:beta=0.5"', "not a JSON file"),
        ("[1]", "not a JSON file"),
        ('{"policy": 3}', 'no "policy" in it'),
        ('{"policy": "des-vot"}', "unknown policy 'des-vot'"),
        ('{"policy": "topk:k=2"}', 'no "model" with name, fingerprint, layers and experts in it'),
        (
            json.dumps({**ENOUGH, "model": {**ENOUGH["model"], "layers": "2"}}),  # type: ignore[dict-item]
            'no "model" with name, fingerprint, layers and experts in it',
        ),
    ],
)
def test_a_broken_file_is_named(
    capsys: Capture, model: str, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    printed = refusal(capsys, "generate", "5 17 33", "-m", model, "-p", f"@{path}")
    assert printed.startswith(f"coterie: {path}: ")
    assert message in printed


def test_a_file_that_is_not_there_is_named(capsys: Capture, model: str, tmp_path: Path) -> None:
    path = tmp_path / "absent.json"
    for command in ("generate", "compare"):
        printed = refusal(capsys, command, "5 17 33", "-m", model, "-p", f"@{path}")
        assert printed == f"coterie: {path}: no such file; `coterie calibrate -o` writes one\n"
    with pytest.raises(CoterieError, match=f"{tmp_path}.*not a regular file"):
        read_calibrated_policy(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("des-vote:beta=0.3", "--target", "mass=0.5"), "one parameter to search"),
        (("des-vote", "--target", "much"), "unknown target 'much'"),
        (("des-vote", "--target", "mass=0.5"), "--task or --prompt-file is needed with a model"),
        (("des-vote", "--target", "drop=0.5", "--prompt-file"), "drop needs graded prompts"),
        (("racing", "--per-layer", "--target", "mass=0.5", "--prompt-file"), "no budget for each"),
        (("des-seq", "--target", "experts=1", "--prompt-file"), "no policy meets experts=1"),
        (
            ("topk", "--target", "mass=0.5", "-o", "no/such/x.json", "--prompt-file"),
            "does not exist",
        ),
        (("topk", "--target", "mass=0.5", "-o", ".", "--prompt-file"), ".: a folder"),
        (("topk", "--target", "mass=0.5", "--task", "words", "--prompt-file"), "give one of them"),
        (("topk", "--target", "mass=0.5", "--task", "wrds"), "unknown task 'wrds'"),
    ],
)
def test_what_cannot_be_calibrated_is_named(
    capsys: Capture, model: str, prompts: str, words: tuple[str, ...], message: str
) -> None:
    words = (*words, prompts) if words[-1] == "--prompt-file" else words
    assert message in refusal(capsys, "calibrate", *words, "-m", model, *DECODING)


@pytest.fixture(scope="module")
def command(model: str, prompts: str) -> list[str]:
    return ["calibrate", "des-vote", "--prompt-file", prompts, "-m", model, *DECODING]


@pytest.mark.parametrize(
    "target",
    [
        "experts=6",
        "mass=0.8 --per-layer",
        pytest.param("experts=6 --per-layer", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_calibration_goes_on_with_the_same_command(
    target: str,
    command: list[str],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*command, "--target", *target.split()]
    whole, path = tmp_path / "whole.json", tmp_path / "stopped.json"
    calls = 0

    def count(limit: int) -> None:
        decode = measurement.PolicyEvaluator._decode

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            return decode(*arguments)

        monkeypatch.setattr(measurement.PolicyEvaluator, "_decode", counted)

    count(1000)
    assert run([*words, "-o", str(whole)]) == 0
    needed, calls = calls, 0
    monkeypatch.undo()
    count(needed - 2)
    with suppress(KeyboardInterrupt):
        assert run([*words, "-o", str(path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    calls = 0
    monkeypatch.undo()
    count(2)
    assert run([*words, "-o", str(path)]) == 0
    assert calls == 2
    for key in ("policy", "achieved", "beyond", "decoding", "search"):
        assert json.loads(path.read_text())[key] == json.loads(whole.read_text())[key]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stopped.json", "whole.json"]


def test_a_full_disk_shows_the_table_and_keeps_the_measurements(
    command: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int) -> None:
        del descriptor
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "six.json"
    path.write_text("old")
    words = [*command, "--target", "experts=6", "-o", str(path)]
    write = output.print_result

    def print_and_fill(*parts: Any, **options: Any) -> None:
        write(*parts, **options)
        monkeypatch.setattr(os, "fsync", full_disk)

    monkeypatch.setattr(output, "print_result", print_and_fill)
    assert run(words) == 2
    shown = capsys.readouterr()
    assert "meets experts=6" in shown.out
    assert "six.json: cannot be written (No space left" in shown.err
    assert path.read_text() == "old"
    assert (tmp_path / "six.json.journal").exists()
