"""What the commands print and refuse, held against snapshots in ``tests/net``.

Each case is a command line; its snapshot has the exit status, the document (times, speeds, machine
and versions left out) and the line on standard error. Policies are compared as they are spelled
now. After an intended change the snapshots are written again, and the difference is reviewed:

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

HERE = Path(__file__).parent
NET, KEPT = HERE / "net", HERE / "kept"
PROMPT = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
TIMED = {
    *("seconds", "tokens_per_second", "stall_seconds", "stalled", "waited", "when", "commit_of"),
    *("machine", "versions", "command", "took", "ms", "samples", "median", "spread", "path"),
    *("folder", "out", "device", "free", "fits", "made", "bytes_per_second", "started"),
}
G, TINY = ["generate", PROMPT, "-n", "32"], ["-m", "tiny"]
PREFERRING = ["-p", "resident-vote:beta=0.3,lam=1,eps=0.1", "--simulate-expert-memory", "35%"]
WORDS = ["eval", "--task", "words", "--num-problems", "2", "-n", "32", "-p"]
RIGHT: Mapping[str, list[str]] = {
    "generate": [*G, "--json"],
    "generate-text": G,
    "generate-policy": [*G, "-p", "des-vote:beta=0.3,voters=unfilled,protect=top1", "--json"],
    "generate-memory": [*G, *PREFERRING, "--commit-routing", "policy", "--coreset-reuse", "0.05", "--json"],
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
        *("replay", "kept/words.trace", "-p", "des-vote:beta=0.3", "--eviction", "lru,votes,belady"),
        *("--expert-memory", "35%,60", "--other-ms", "3", "--memory-bandwidth", "60GB/s", "--json"),
    ],
    "replay-csv": ["replay", "kept/words.trace", "-p", PREFERRING[1], "--coreset-reuse", "0.1", "--csv"],
    "quantize": ["quantize", "tiny", "again", "--expert-dtype", "int4", "--group-size", "16", "--json"],
}
BENCH = [
    *("bench", "layer", "--shape", "llada-moe", "--dtype", "int4", "--baseline", "none"),
    *("--repeats", "1", "--tokens", "8", "-p", "vanilla", "-o", "bench", "--json"),
]
WRONG: list[list[str]] = [
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
        ["--commit-routing", "never"], ["--coreset-reuse", "1"], ["--coreset-reuse", "0.1"], ["--dtype", "float8"],
        ["--device", "tpu"], ["--expert-dtype", "int3"], ["--expert-memory", "35%"],
        ["--simulate-expert-memory", "some"], ["--simulate-expert-memory", "35%", "--eviction", "oldest"],
        ["--warm-start", "kept/words.votes"], ["--precision-policy", "static"], ["--no-such-option"],
        ["-n", "0"],
    )),
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


def prepared(folder: Path) -> None:
    """Everything that the command lines name, in a folder of its own."""
    shutil.copytree(KEPT, folder / "kept")
    write_checkpoint(folder / "tiny", "llada2", seed=3)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name, more in (
            ("int8", ["int8"]), ("int4", ["int4"]), ("plain", ["int8", "--layout", "plain"])
        ):  # fmt: skip
            assert (
                run(["quantize", str(folder / "tiny"), str(folder / name), "--expert-dtype", *more]) == 0
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


def seen(words: list[str]) -> dict[str, Any]:
    """What a command line comes to, as far as it is the same on every run."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(words)
    said: Any = out.getvalue()
    if "--json" in words and status == 0:
        said = cleaned(json.loads(said))
        if words[0] == "trace":  # its size counts the commit in the header
            del said["bytes"], said["bytes_a_forward"]
    elif "--csv" in words and status == 0:
        said = said.splitlines()[0]
    line = err.getvalue().replace(str(Path(coterie.__file__).parent), "coterie")
    return {"status": status, "out": said, "err": line}


def cleaned(value: Any) -> Any:
    """Without what differs from run to run; numbers to six digits."""
    if isinstance(value, dict):
        return {key: cleaned(inner) for key, inner in value.items() if key not in TIMED}
    if isinstance(value, str):
        return COMMIT.sub("COMMIT", value)
    if isinstance(value, list):
        return [cleaned(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def keys(value: Any) -> Any:
    """Only the keys of a document, whose numbers are times; of a list, those of its first entry."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(inner) for inner in value[:1]] if isinstance(value, list) else None


def benched() -> Any:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert run(BENCH) == 0
    return keys(json.loads(out.getvalue()))


def snapshot(name: str) -> Any:
    return json.loads((NET / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    prepared(folder)
    return folder


@pytest.mark.parametrize("name", RIGHT)
def test_a_command_says_what_it_said(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coterie.routing import update_policies_in_json  # here: older versions write snapshots too

    monkeypatch.chdir(place)
    assert update_policies_in_json(seen(RIGHT[name])) == update_policies_in_json(snapshot(name))


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_refusal_says_what_it_said(
    number: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coterie.routing import update_policies_in_json

    monkeypatch.chdir(place)
    kept = snapshot("refused")[number]
    assert kept["words"] == WRONG[number]
    found = {"words": WRONG[number], **seen(WRONG[number])}
    assert update_policies_in_json(found) == update_policies_in_json(kept)


@pytest.mark.slow
def test_a_bench_has_the_same_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert benched() == snapshot("bench-layer")


def test_the_names_to_import_are_the_same() -> None:
    assert sorted(coterie.__all__) == snapshot("exports")


def write(names: list[str]) -> None:
    NET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder))
        os.chdir(folder)
        found: dict[str, Any] = {"exports": sorted(coterie.__all__)}
        found |= {name: seen(words) for name, words in RIGHT.items() if not names or name in names}
        if not names or "refused" in names:
            found["refused"] = [{"words": words, **seen(words)} for words in WRONG]
        if not names or "bench-layer" in names:
            found["bench-layer"] = benched()
        for name, value in found.items():
            text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            (NET / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:])
