"""``coterie eval --task text``: its output, its folder and its errors."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from coterie.cli.entry import run

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("embedded_once")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "a.txt"
    file.write_text("Tom has 3 boxes of 4 pens and gives away 5.\n" * 30)
    return file


def test_all_formats_hold_the_same_numbers(text: Path, capsys: Capture) -> None:
    command = ("eval", "--task", "text", "--data", str(text), "--samples", "2")
    command += ("-p", "des-vote:beta=0.3", "-o", str(text.parent / "run"))
    assert run([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert run([*command, "--csv"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert "going on after" in err
    assert run(command) == 0
    table = capsys.readouterr().out
    for policy, row in zip(document["policies"], rows, strict=True):
        bits = policy["bits_per_byte"]
        assert float(row["bits_per_byte value"]) == bits["value"]
        assert float(row["bits_per_byte interval_low"]) == bits["interval"][0]
        assert f"{bits['value']:.4f}" in table
    assert document["policies"][0]["change"] is None
    assert document["policies"][1]["rise_interval"][0] <= document["policies"][1]["rise"]
    assert document["run"]["text"]["bytes"] == len(text.read_bytes())
    record = json.loads((text.parent / "run" / "bits-a-byte-by-policy.json").read_text())
    assert record["facts"]["policies"][1]["policy"] == "des-vote:beta=0.3"


@pytest.mark.parametrize(("words", "message"), [
    (("--task", "text"), "needs --data"),
    (("--task", "text", "--task", "words", "--data", "."), "runs alone"),
    (("--task", "text", "--data", ".", "-n", "5"), "--max-new-tokens has no effect"),
    (("--task", "text", "--data", ".", "--shots", "2"), "shots.*has no effect"),
    (("--task", "text", "--data", ".", "--coreset-reuse", "0.1"), "--coreset-reuse has no effect"),
    (("--task", "words", "--samples", "2"), "samples has no effect"),
])  # fmt: skip
def test_options_without_effect_are_refused(
    words: tuple[str, ...], message: str, capsys: Capture
) -> None:
    assert run(["eval", *words]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in message.split(".*"))


def test_the_text_model_predicts_source_code(capsys: Capture) -> None:
    """Even odds for each of its 4,096 tokens would cost 12 bits."""
    command = ["eval", "--task", "text", "--model", "text", "--data", __file__, "--json"]
    assert run(command) == 0
    (vanilla,) = json.loads(capsys.readouterr().out)["policies"]
    assert vanilla["bits_per_token"]["value"] < 9
