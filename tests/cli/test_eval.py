"""``coterie eval``: its output, its errors, and resumed runs."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event as Flag
from threading import main_thread

import pytest
from rich.console import Console
from script_modules import load_script

from coterie.cli.entry import run
from coterie.cli.eval_output import EvalProgress, accuracy_document, accuracy_tables
from coterie.cli.output import format_csv
from coterie.lab.evals.answer_log import Answer
from coterie.lab.evals.report import summarize
from coterie.lab.evals.run import EvalResult, Variant

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("embedded_once")

ASKED = [
    *("eval", "--task", "words", "--task", "algebra", "--num-problems", "3"),
    *("--batch-size", "6", "-n", "32"),
]
LONG = "des-vote:beta=0.3,voters=before-eos,protect=top1"


def answer(variant: str, number: int, correct: bool, **others: object) -> Answer:
    fields: dict[str, object] = {
        "extracted": None, "other_metrics": {}, "output": "", "finish_reason": "stop",
        "new_tokens": 10, "forwards": 2, "blocks": 1, "prefills": 1, "commits": 0, "experts": 8.0,
        "expert_forwards": 2, "expert_bytes": 100.0, "vote_mass_kept": 1.0, "seconds": 0.5,
    }  # fmt: skip
    fields |= {"variant": variant, "task": "quiz", "id": str(number), "correct": correct, **others}
    return Answer(**fields)  # type: ignore[arg-type]


def sheet(policy: str, right: Sequence[bool]) -> EvalResult:
    variant = Variant(policy)
    return EvalResult(
        variant, tuple(answer(variant.name, i, correct) for i, correct in enumerate(right))
    )


def refusal(capsys: Capture, *words: str) -> str:
    assert run(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_json_has_the_settings_and_the_results(capsys: Capture) -> None:
    assert run([*ASKED, "-p", "des-vote:beta=0.3", "-p", "vanilla", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "embedded"
    assert list(result["run"]["tasks"]) == ["words", "algebra"]
    words = result["run"]["tasks"]["words"]
    assert words["items"] == 3
    assert words["settings"]["seed"] == 1
    assert words["generation"]["block"] == 32
    assert re.fullmatch("[0-9a-f]{16}", result["run"]["model"])
    vanilla, vote = result["policies"]
    assert [vanilla["policy"], vote["policy"]] == ["vanilla", "des-vote:beta=0.3"]
    assert vanilla["change"] is None
    assert vanilla["accuracy"]["n"] == 6
    assert vote["change"]["value"] == pytest.approx(
        vote["accuracy"]["value"] - vanilla["accuracy"]["value"]
    )
    assert vote["experts"] <= 38 < vanilla["experts"]
    assert min(vote["tokens_per_second"], vote["forwards_per_block"], vote["expert_bytes"]) > 0


def test_a_stopped_run_continues_and_another_run_is_refused(
    capsys: Capture, tmp_path: Path
) -> None:
    words = [*ASKED, "--csv", "-o", str(tmp_path)]
    assert run(words) == 0
    first = capsys.readouterr()
    lines = (tmp_path / "items.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "items.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    assert run([*words, "-p", "des-seq:k=3"]) == 0
    again = capsys.readouterr()
    assert "4 of 12 answers are from an earlier run" in again.err
    names = {path.name for path in tmp_path.iterdir()}
    stem = "embedded-tasks-by-policy"
    assert names == {"items.jsonl", "run.json", f"{stem}.json", f"{stem}.csv"}
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    assert [line["policy"] for line in record["facts"]["policies"]] == ["vanilla", "des-seq:k=3"]
    assert "may be chance" not in again.err
    assert (tmp_path / f"{stem}.csv").read_text() == again.out.replace("\r\n", "\n")
    before, after = (next(csv.DictReader(io.StringIO(printed.out))) for printed in (first, again))
    assert {k: v for k, v in before.items() if k in ("policy", "right", "n", "accuracy_low")} == {
        k: v for k, v in after.items() if k in ("policy", "right", "n", "accuracy_low")
    }
    limited = refusal(capsys, *words, "--limit", "2")
    assert "--limit is not set in the folder and 2 in this run" in limited
    few = refusal(capsys, *words, "--expert-dtype", "int8")
    assert '--expert-dtype is not set in the folder and "int8 in groups of 64" in this run' in few
    assert run(words) == 0
    assert "all 6 answers are from an earlier run" in capsys.readouterr().err
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    assert [line["policy"] for line in record["facts"]["policies"]] == ["vanilla", "des-seq:k=3"]


def test_a_policy_that_joins_later_keeps_the_earlier_ones(capsys: Capture, tmp_path: Path) -> None:
    words = [*ASKED[:3], "--num-problems", "2", "-o", str(tmp_path)]
    for policy in ("des-seq:k=3", "topk:k=4"):
        assert run([*words, "-p", policy]) == 0
    assert "on 2 items a change below 65.8% may be chance" in capsys.readouterr().err
    items = tmp_path / "items.jsonl"
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:5]))
    assert run([*words, "--csv"]) == 0
    printed = capsys.readouterr()
    assert "topk:k=4 has 1 of 2 answers and is left out" in printed.err
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [row["policy"] for row in rows] == ["vanilla", "des-seq:k=3"]


@pytest.mark.parametrize(("broken", "status"), [({0}, 1), ({0, 1}, 2)])
def test_failures_are_counted_by_their_reason(
    broken: set[int], status: int, capsys: Capture, tmp_path: Path
) -> None:
    words = [*ASKED[:3], "--num-problems", "2", "-o", str(tmp_path)]
    assert run(words) == 0
    items = tmp_path / "items.jsonl"
    answers = list(map(json.loads, items.read_text().splitlines()))
    for number in broken:
        reason = "the head returned NaN or infinite values; no token was written"
        answers[number] |= {"correct": False, "finish": "error", "error": reason}
    items.write_text("".join(json.dumps(one) + "\n" for one in answers))
    capsys.readouterr()
    assert run(words) == status
    err = capsys.readouterr().err
    assert f"{len(broken)} answers failed and count as wrong: the head returned NaN" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "somewhere/else"], "--task is needed with a model; tasks: gsm8k"),
        (
            ["--task", "gsm8k", "--num-problems", "3"],
            "has no effect on gsm8k; --limit",
        ),
        (["--data", "."], "--data has no effect on words"),
        (["--task", "chess"], "unknown task 'chess'; known: gsm8k"),
        (["--task", "gsm8k", "--data", "/no/such"], "/no/such: no such file or folder"),
        (["--json", "--csv"], "give one of them"),
        (["--shots", "2"], "words is zero-shot"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "0"], "--batch-size"),
        (["-p", "chess"], "unknown policy 'chess'"),
        (["-p", "@/no/such"], "/no/such"),
        (["-n", "100000"], "max_new_tokens=100000"),
        (["--top-k", "3"], "--top-k needs --temperature above 0"),
        (["-o", "/dev/null/x"], "/dev/null/x: Not a directory"),
    ],
)
def test_bad_input_is_one_line(capsys: Capture, words: list[str], expected: str) -> None:
    complaint = refusal(capsys, "eval", *words)
    assert expected in complaint
    assert complaint.count("\n") == 1


def test_an_interrupt_keeps_answers_and_names_the_folder(capsys: Capture, tmp_path: Path) -> None:
    words = ["eval", "--num-problems", "50", "--batch-size", "2", "-n", "32"]
    items, ended = tmp_path / "items.jsonl", Flag()

    def interrupt() -> None:
        # The answers of the first batch are reported once those of the second are written.
        while not ended.wait(0.02):
            if items.exists() and len(items.read_bytes().splitlines()) > 3:
                return signal.pthread_kill(main_thread().ident, signal.SIGINT)

    with ThreadPoolExecutor(1) as user:
        user.submit(interrupt)
        status = run([*words, "-o", str(tmp_path)])
        ended.set()
    out, err = capsys.readouterr()
    assert (status, out) == (130, "")
    hint = re.fullmatch(
        rf"coterie: (\d+) of 200 answers are in {tmp_path}; the same command continues from "
        r"there\ncoterie: stopped\n",
        err,
    )
    assert hint is not None, err
    assert 2 <= int(hint[1]) <= len(items.read_bytes().splitlines())


def test_tables_fit_the_terminal_and_lose_no_number() -> None:
    right = [True, True, False, True] * 5
    result = summarize([sheet("vanilla", right), sheet(LONG, right[1:] + right[:1])], ["quiz"])
    texts = {}
    for width in (200, 80, 60):
        to = Console(file=io.StringIO(), width=width)
        for table in accuracy_tables(result, to):
            to.print(table)
        texts[width] = to.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, texts[width].splitlines())) <= width
        assert "…" not in texts[width]
    numbers = re.compile(r"[-+]?\d+\.\d+%?")
    wide = sorted(numbers.findall(texts[200].replace(LONG, "")))
    assert {n for n in wide if n.endswith("%")} == {
        n for n in numbers.findall(texts[60]) if n.endswith("%")
    }


def test_csv_has_one_line_a_policy_with_all_digits() -> None:
    right = [True, True, False]
    result = summarize(
        [sheet("vanilla", right), sheet("des-seq:k=3", [False, True, True])], ["quiz"]
    )
    first, second = csv.DictReader(io.StringIO(format_csv([line.csv_row() for line in result])))
    assert (first["policy"], first["right"], first["n"], first["change"]) == (
        "vanilla",
        "2",
        "3",
        "",
    )
    assert (second["gained"], second["lost"], second["change"]) == ("1", "1", "0.0")
    assert (float(second["relative_accuracy"]), float(second["p"])) == (1.0, 1.0)
    assert float(first["accuracy"]) == 2 / 3
    assert float(first["tokens_per_second"]) == 20.0


def test_the_readmes_table_can_be_drawn_from_a_record() -> None:
    right = [True, True, False]
    result = summarize(
        [sheet("vanilla", right), sheet("des-seq:k=3", [False, True, True])], ["quiz"]
    )
    record = {"facts": accuracy_document("embedded", {}, result)}
    head, _, first, second = load_script("docs.py").accuracy_table(record).splitlines()
    assert "| quiz |" in head
    assert first.startswith("| `vanilla` | 66.7% of 3, 20.8% to 93.9% | 66.7% |")
    assert second.endswith("| +0.0%, 1 | 8.0 | 2.0 |")


def test_progress_counts_resumed_answers_and_compares_common_items() -> None:
    progress = EvalProgress(["vanilla", "des-seq:k=3"], 8)
    for number, correct in enumerate([True, True, False]):
        progress.add(answer("vanilla", number, correct, from_disk=True))
    for number, correct in enumerate([True, False]):
        progress.add(answer("des-seq:k=3", number, correct))
    to = Console(file=io.StringIO(), width=100)
    to.print(progress)
    printed = to.file.getvalue()  # type: ignore[attr-defined]
    assert (progress.count, progress.resumed) == (5, 3)
    assert "5/8" in printed
    assert re.search(r"vanilla +66.7% of 3", printed)
    assert re.search(r"des-seq:k=3 +50.0% of 2 +-50.0%", printed)
