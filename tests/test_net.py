"""The output and the errors of the commands equal the snapshots in ``tests/net``.

Each case is a command line. Its snapshot has the exit status, the document (without times, speeds,
machine and versions) and standard error. Policies are compared in their current form. After an
intended change, write the snapshots again and review the difference:

    OMP_NUM_THREADS=1 PYTHONPATH=src:tests .venv/bin/python tests/test_net.py [NAME ...]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import coterie
from coterie.cli.entry import run
from coterie.testing import write_checkpoint

TESTS = Path(__file__).parent
NET, KEPT = TESTS / "net", TESTS / "kept"
pytestmark = pytest.mark.usefixtures("embedded_once")
PROMPT = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
TIMED = {
    *(
        "seconds",
        "tokens_per_second",
        "stall_seconds",
        "stalled",
        "stall_fraction",
        "waited",
        "when",
        "commit_of",
    ),
    *("machine", "versions", "command", "took", "ms", "samples", "median", "spread", "path"),
    *("folder", "out", "device", "free", "fits", "made", "bytes_per_second", "started"),
}
G, TINY = ["generate", PROMPT, "-n", "32"], ["-m", "tiny"]
PREFERRING = ["-p", "resident-vote:beta=0.3,lam=1,eps=0.1", "--simulate-expert-memory", "35%"]
WORDS = ["eval", "--task", "words", "--num-problems", "2", "-n", "32", "-p"]
COMMANDS: Mapping[str, list[str]] = {
    "generate": [*G, "--json"],
    "generate-text": G,
    "generate-old-names": [*G, "--plan", "uncached", "--imagine-memory=35%", "--json"],
    "generate-vanilla": [*G, "-p", "priced-vote:price=0.022", "--compare-vanilla"],
    "generate-policy": [*G, "-p", "des-vote:beta=0.3,voters=unfilled,protect=top1", "--json"],
    "generate-memory": [
        *G,
        *PREFERRING,
        "--commit-routing",
        "policy",
        "--coreset-reuse",
        "0.05",
        "--json",
    ],
    "generate-warm": [*G, *PREFERRING, "--warm-start", "kept/words.votes", "--json"],
    "generate-calibrated": [*G, "-p", "@kept/calibrated.json", "--json"],
    "generate-dual": [*G, "--kv-cache", "dual:before=16,after=16", "--block", "16", "--json"],
    "generate-drawn": [*G, "-t", "0.7", "--top-k", "5", "--seed", "3", "--json"],
    "generate-tiny": ["generate", "5 17 33", *TINY, "-n", "9", "--early-stop", "off", "--json"],
    "generate-int8": ["generate", "5 17 33", *TINY, "-n", "9", "--expert-dtype", "int8", "--json"],
    "generate-packed": ["generate", "5 17 33", "-m", "int8", "-n", "9", "--json"],
    "generate-rationed": [
        *("generate", "5 17 33", "-m", "int8", "-n", "9", "--expert-memory", "50%"),
        *("-p", "des-vote:beta=0.3,most=slots", "--eviction", "votes:decay=0.9", "--json"),
    ],
    "generate-mixed": [
        *("generate", "5 17 33", "-m", "int8", "-n", "9", "--expert-memory", "50%"),
        *("--fallback-model", "int4", "--precision-policy", "promote:most=2,share=0.5", "--json"),
    ],
    "compare": [
        "compare",
        PROMPT,
        "-n",
        "32",
        "-p",
        "des-seq:k=3",
        "-p",
        "naee:beta=0.5",
        "--json",
    ],
    "eval": [*WORDS, "des-vote:beta=0.3", "-p", "random:beta=0.3", "--json"],
    "eval-csv": [*WORDS, "xshare:beta=0.3", "--csv"],
    "eval-memory": [*WORDS, PREFERRING[1], *PREFERRING[2:], "--json"],
    "inspect": ["inspect", "--json"],
    "inspect-tiny": ["inspect", "tiny", "--length", "64", "--json"],
    "inspect-packed": ["inspect", "int8", "--verify", "--json"],
    "inspect-plain": ["inspect", "plain", "--verify", "--json"],
    "policies": ["policies", "--json"],
    "grade": ["grade", "gsm8k", "outputs.jsonl"],
    "calibrate": [
        *("calibrate", "des-vote:protect=top1", "--target", "mass=0.9", "--task", "words"),
        *("--num-problems", "2", "-n", "32", "--json"),
    ],
    "trace": [
        *("trace", "--task", "words", "--num-problems", "1", "-n", "32", "--max-forwards", "3"),
        *("-o", "new.trace", "--save-votes", "new.votes", "--json"),
    ],
    "replay": [
        *(
            "replay",
            "kept/words.trace",
            "-p",
            "des-vote:beta=0.3",
            "--eviction",
            "lru,votes,belady",
        ),
        *("--expert-memory", "35%,60", "--other-ms", "3", "--memory-bandwidth", "60GB/s", "--json"),
    ],
    "replay-csv": [
        "replay",
        "kept/words.trace",
        "-p",
        PREFERRING[1],
        "--coreset-reuse",
        "0.1",
        "--csv",
    ],
    "quantize": [
        "quantize",
        "tiny",
        "again",
        "--expert-dtype",
        "int4",
        "--group-size",
        "16",
        "--json",
    ],
}
BENCH = [
    *("bench", "layer", "--shape", "llada-moe", "--dtype", "int4", "--baseline", "none"),
    *("--repeats", "1", "--tokens", "8", "-p", "vanilla", "-o", "bench", "--json"),
]
REFUSED_COMMANDS: list[list[str]] = [
    *([*G, "-p", text] for text in (
        "nothing", "des-vote", "des-vote:beta", "des-vote:beta=", "des-vote:beta=two",
        "des-vote:beta=0", "des-vote:beta=1.5", "des-vote:beta=0.3,beta=0.2",
        "des-vote:beta=0.3,colour=red", "des-vote:beta=0.3/0.2", "des-vote:beta=0.3,vote=loud",
        "des-vote:beta=0.3,voters=some", "des-vote:beta=0.3,lam=-1", "des-vote:beta=0.3,eps=2",
        "des-vote:beta=0.3,most=few", "topk:k=1.5", "coreset:m=2,tau=0.5", "coreset:least=3,m=2",
        "des-vote:beta=0.2,vote=random,tally=proportional", "@absent.json", "@kept/words.trace",
    )),
    *([*G, *more] for more in (
        ["--kv-cache", "none"], ["--kv-cache", "dual:before=-1"], ["--unmask", "often"],
        ["--unmask", "threshold:p=2"], ["--threshold", "3"], ["--temperature", "-1"],
        ["--commit-routing", "never"], ["--coreset-reuse", "1"], ["--coreset-reuse", "0.1"],
        ["--dtype", "float8"],
        ["--device", "tpu"], ["--expert-dtype", "int3"], ["--expert-memory", "35%"],
        ["--simulate-expert-memory", "some"],
        ["--simulate-expert-memory", "35%", "--eviction", "oldest"],
        ["--warm-start", "kept/words.votes"], ["--precision-policy", "static"],
        ["--no-such-option"],
    )),
    ["generate", "5", "-n", "0"],
    ["generate", "5 17 33", "-m", "truncated"],
    ["generate", "5 17 33", "-m", "strange"],
    ["generate", "5 17 33", "-m", "empty"],
    ["inspect", "tiny", "--verify"],
    ["inspect", "damaged", "--verify"],
    ["inspect", "tiny", "--dtype", "bf8"],
    ["eval", "--task", "none"],
    ["eval", "--task", "gsm8k", "--data", "absent"],
    [*WORDS, "des-vote:beta=0.3", "-o", "kept/eval-finished"],
    ["grade", "gsm8k", "absent.jsonl"],
    ["grade", "gsm8k", "strange.jsonl"],
    ["calibrate", "vanilla", "--target", "drop=0.01"],
    ["calibrate", "des-vote", "--target", "taste=1"],
    ["replay", "tiny/config.json"],
    ["replay", "kept/words.trace", "--eviction", "oldest"],
    ["replay", "kept/words.trace", "--expert-memory", "many"],
    ["quantize", "tiny", "int8", "--expert-dtype", "int8"],
    ["study", "-o", "new", "--experiment", "none"],
    ["nonsense"],
]  # fmt: skip


def make_files(folder: Path) -> None:
    """Writes every file that the command lines name."""
    shutil.copytree(KEPT, folder / "kept")
    write_checkpoint(folder / "tiny", "llada2", seed=3)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name, more in (
            ("int8", ["int8"]), ("int4", ["int4"]), ("plain", ["int8", "--layout", "plain"])
        ):  # fmt: skip
            assert (
                run(["quantize", str(folder / "tiny"), str(folder / name), "--expert-dtype", *more])
                == 0
            )
    for name, of in (("truncated", "tiny"), ("strange", "tiny"), ("damaged", "plain")):
        shutil.copytree(folder / of, folder / name)
    (folder / "empty").mkdir()
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    config = json.loads((folder / "strange" / "config.json").read_text())
    (folder / "strange" / "config.json").write_text(json.dumps({**config, "sparkle": 1}))
    lines = [
        {"id": "a", "output": "9 * 2 = 18.\n#### 18", "gold": "18"},
        {"id": "b", "output": "It is 17.", "gold": "18"},
        {"id": "c", "output": "", "gold": "#### 1,234"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "outputs.jsonl").write_text(text)
    (folder / "strange.jsonl").write_text(text + "{]\n")


COMMIT = re.compile(r"\b[0-9a-f]{40}\b(\+changes)?")


def run_command(words: list[str]) -> dict[str, Any]:
    """The result of a command line, without what differs between runs."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(words)
    text: Any = out.getvalue()
    if "--json" in words and status == 0:
        text = without_times(json.loads(text))
        if words[0] == "trace":  # its size counts the commit in the header
            del text["bytes"], text["bytes_a_forward"], text["bytes_per_forward"]
    elif "--csv" in words and status == 0:
        text = text.splitlines()[0]
    line = err.getvalue().replace(str(Path(coterie.__file__).parent), "coterie")
    return {"status": status, "out": text, "err": line}


def without_times(value: Any) -> Any:
    """The document without what differs between runs; numbers have six digits."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMED}
    if isinstance(value, str):
        return COMMIT.sub("COMMIT", value)
    if isinstance(value, list):
        return [without_times(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def keys(value: Any) -> Any:
    """The keys of a document whose numbers are times; a list counts as its first entry."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(inner) for inner in value[:1]] if isinstance(value, list) else None


def bench_keys() -> Any:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert run(BENCH) == 0
    return keys(json.loads(out.getvalue()))


def snapshot(name: str) -> Any:
    return json.loads((NET / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder_of_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    make_files(folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_output_equals_its_snapshot(
    name: str, folder_of_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coterie.routing import update_policies_in_json  # here: older versions write snapshots too

    monkeypatch.chdir(folder_of_files)
    assert update_policies_in_json(run_command(COMMANDS[name])) == update_policies_in_json(
        snapshot(name)
    )


@pytest.mark.parametrize("number", range(len(REFUSED_COMMANDS)))
def test_refusal_equals_its_snapshot(
    number: int, folder_of_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coterie.routing import update_policies_in_json

    monkeypatch.chdir(folder_of_files)
    refused = snapshot("refused")[number]
    assert refused["words"] == REFUSED_COMMANDS[number]
    result = {"words": REFUSED_COMMANDS[number], **run_command(REFUSED_COMMANDS[number])}
    assert update_policies_in_json(result) == update_policies_in_json(refused)


@pytest.mark.slow
def test_bench_keys_equal_their_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench_keys() == snapshot("bench-layer")


def test_exported_names_equal_their_snapshot() -> None:
    assert sorted(coterie.__all__) == snapshot("exports")


def write(names: list[str]) -> None:
    NET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        os.chdir(folder)
        result: dict[str, Any] = {"exports": sorted(coterie.__all__)}
        result |= {
            name: run_command(words)
            for name, words in COMMANDS.items()
            if not names or name in names
        }
        if not names or "refused" in names:
            result["refused"] = [
                {"words": words, **run_command(words)} for words in REFUSED_COMMANDS
            ]
        if not names or "bench-layer" in names:
            result["bench-layer"] = bench_keys()
        for name, value in result.items():
            text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            (NET / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:])
