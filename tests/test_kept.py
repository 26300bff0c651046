"""What earlier versions wrote still holds: resumed, drawn again, loaded or refused as before.

``tests/kept`` was written by version 0.1.0 before its names changed. A file there is never written
again: a change that cannot read it breaks what users have on their disks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from coterie.cli.entry import run
from coterie.keys import to_json
from coterie.lab.calibration.policy_file import read_calibrated_policy
from coterie.lab.evals.answer_log import answer_from_dict
from coterie.lab.replay import trace_file
from coterie.loading.saved_votes import read_votes
from coterie.routing import update_policies_in_json
from coterie.testing import write_checkpoint

pytestmark = pytest.mark.usefixtures("embedded_once")

KEPT = Path(__file__).parent / "kept"
EVAL = ["eval", "--task", "words", "--items", "3", "-n", "32"]
PLAIN = [
    *(*EVAL, "-p", "resident-vote:beta=0.15,lam=1,eps=0.1"),
    *("-p", "des-vote:beta=0.3,voters=unfilled,protect=top1"),
]
MEMORY = [
    *(*EVAL, "-p", "resident-vote:beta=0.3,lam=1,eps=0.1,most=slots"),
    *("--imagine-memory", "35%", "--commit", "policy", "--drift", "0.05"),
]
TIMED = ("seconds", "served")
Capture = pytest.CaptureFixture[str]


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(KEPT / name, folder / name))


def answers(folder: Path) -> dict[tuple[str, ...], dict[str, object]]:
    """Each by its key, without what takes time; sums differ a little beside other rows."""
    lines = map(json.loads, (folder / "items.jsonl").read_text().splitlines())
    found = {one.key: to_json(one) for one in map(answer_from_dict, lines)}
    return {
        key: {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in one.items()
            if name not in TIMED
        }
        for key, one in found.items()
    }


@pytest.mark.parametrize(("name", "words"), [("eval-finished", PLAIN), ("eval-memory", MEMORY)])
def test_a_finished_evaluation_answers_nothing_again(
    name: str, words: list[str], tmp_path: Path
) -> None:
    folder = copied(name, tmp_path)
    assert run([*words, "-o", str(folder)]) == 0
    assert (folder / "items.jsonl").read_bytes() == (KEPT / name / "items.jsonl").read_bytes()
    file = next(folder.glob("embedded*.json")).name
    now, then = (json.loads((at / file).read_text()) for at in (folder, KEPT / name))
    for record in (now, then):
        for policy in record["facts"]["policies"][1:]:
            del policy["change"]["interval"]  # once a bootstrap, now a score interval
    assert now["facts"]["policies"] == update_policies_in_json(then["facts"]["policies"])


def test_an_unfinished_evaluation_goes_on(tmp_path: Path) -> None:
    folder = copied("eval-unfinished", tmp_path)
    before = (folder / "items.jsonl").read_bytes()
    assert run([*PLAIN, "-o", str(folder)]) == 0
    whole = before[: before.rindex(b"\n") + 1]
    assert (folder / "items.jsonl").read_bytes().startswith(whole)
    assert answers(folder) == answers(KEPT / "eval-finished")


def test_an_unfinished_evaluation_with_a_memory_goes_on(tmp_path: Path) -> None:
    folder = copied("eval-memory", tmp_path)
    items = folder / "items.jsonl"
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:4]) + '{"arm": "van')
    assert run([*MEMORY, "-o", str(folder)]) == 0
    assert answers(folder) == answers(KEPT / "eval-memory")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "2"], "--seed of task words is 1 in the folder and 2 in this run"),
        (["--block", "16"], "--block of task words is 32 in the folder and 16 in this run"),
        (
            ["--plan", "uncached"],
            '--kv-cache of task words is "block-causal" in the folder and "uncached" in',
        ),
        (
            ["--imagine-memory", "35%"],
            "holds another run: --expert-memory is not set in the folder and set",
        ),
    ],
)
def test_an_evaluation_of_another_run_is_refused(
    more: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = copied("eval-finished", tmp_path)
    assert run([*PLAIN, *more, "-o", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_a_study_draws_its_record_again(tmp_path: Path) -> None:
    folder = copied("study", tmp_path)
    words = ["study", "-o", str(folder), "--chapter", "explosion", "--items", "2"]
    assert run([*words, "--prompts", "2"]) == 0
    record = "records/explosion.json"
    assert (folder / record).read_bytes() == (KEPT / "study" / record).read_bytes()
    assert "explosion" in (folder / "report.html").read_text()


def test_a_calibrated_policy_is_read() -> None:
    kept = read_calibrated_policy(KEPT / "calibrated.json")
    assert kept.policy == "des-vote:beta=0.1328125,voters=before-eos"
    model = kept.model
    assert (model.layers, model.experts, model.name) == (4, 128, "embedded")
    assert kept.generation["plan"] == "block-causal"


def test_a_trace_and_saved_votes_are_read(tmp_path: Path) -> None:
    found = trace_file.read_trace(KEPT / "words.trace")
    assert (len(found.forwards), found.truncated, found.header.experts) == (4, False, 128)
    head = json.loads((KEPT / "words.trace").read_bytes().partition(b"\n")[0])
    assert {**head, **to_json(found.header), "layers": head["layers"]} == head
    with trace_file.TraceWriter(tmp_path / "again", found.header) as writer:
        for one in found.forwards:
            writer.write(one)
    assert len(trace_file.read_trace(tmp_path / "again").forwards) == 4
    votes = read_votes(KEPT / "words.votes")
    assert (votes.model, len(votes.layers), len(votes.votes[0])) == ("embedded", 4, 128)


def test_a_packed_checkpoint_is_what_its_manifest_says(tmp_path: Path, capsys: Capture) -> None:
    tiny = write_checkpoint(tmp_path / "tiny", "llada2", seed=3)
    assert run(["quantize", str(tiny), str(tmp_path / "packed"), "--experts", "int8"]) == 0
    for name in ("config.json", "manifest.json"):
        places = tmp_path / "packed", KEPT / "packed"
        now, then = (json.loads((at / name).read_text()) for at in places)
        for one in (now, then):
            # The kept folder is of a source whose config had no mask token.
            one.pop("mask_token_id", None)
            for key in ("name", "fingerprint"):
                one.get("source", {}).pop(key, None)
        assert now == then
        shutil.copyfile(KEPT / "packed" / name, tmp_path / "packed" / name)
    assert run(["inspect", str(tmp_path / "packed"), "--verify", "--json"]) == 0
    assert '"verified"' in capsys.readouterr().out
