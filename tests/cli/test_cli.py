"""The command: what it prints, what it refuses in one line, and how it ends."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from coterie.cli.entry import run
from coterie.offload.capacity import format_bytes
from coterie.routing import POLICIES
from coterie.routing.descriptions import split_source
from coterie.testing import write_checkpoint

FIELDS = [
    "schema",
    *("text", "finish_reason", "prompt_tokens", "new_tokens", "forwards", "prefills", "commits"),
    *("blocks", "seconds", "tokens_per_second"),
    *("policy", "model", "dtype", "device", "experts", "expert_bytes"),
    *("expert_bytes_vanilla", "vote_mass_kept", "coresets_kept", "drift"),
]
Capture = pytest.CaptureFixture[str]
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaDA2 with 16 experts and top-4, without a tokenizer."""
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny"), "llada2", seed=3))


def document(capsys: Capture, *words: str) -> dict:
    assert run([*words, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def refusal(capsys: Capture, *words: str) -> str:
    """The one line of an invocation that must fail."""
    assert run(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("coterie: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_generate_prints_the_text_alone(capsys: Capture, model: str) -> None:
    assert run(["generate", "5 17 33", "-m", model, "-n", "7"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.fullmatch(r"(\d+ ){,6}\d+\n", printed.out)


def test_json_is_one_document_with_these_fields(capsys: Capture, model: str) -> None:
    result = document(capsys, "generate", "5 17 33", "-m", model, "-n", "12", "--block", "8")
    assert list(result) == FIELDS
    assert list(result["experts"]) == ["total", "max", "mean", "per_layer"]
    assert (result["experts"]["total"], len(result["experts"]["per_layer"])) == (16, 2)
    assert (result["prompt_tokens"], result["model"], result["policy"]) == (3, model, "vanilla")
    assert (result["dtype"], result["device"], result["vote_mass_kept"]) == ("float32", "cpu", 1.0)
    assert result["expert_bytes"] == result["expert_bytes_vanilla"] > 0
    assert result["new_tokens"] == len(result["text"].split())
    assert result["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("policy", "most"),
    [
        ("des-vote:beta=0.3,voters=masked,protect=none", 4),
        ("racing:m=5", 5),
        ("coreset:m=6,vote=weight", 6),
    ],
)
def test_counted_experts_stay_inside_the_budget(
    capsys: Capture, model: str, policy: str, most: int
) -> None:
    result = document(
        capsys, "generate", "5 17 33", "-m", model, "-n", "12", "--block", "8", "-p", policy
    )
    assert result["experts"]["max"] <= most
    assert 0 < result["vote_mass_kept"] < 1
    assert result["expert_bytes"] < result["expert_bytes_vanilla"]


def test_a_full_share_is_vanilla(capsys: Capture, model: str) -> None:
    words = ["generate", "5 17 33", "-m", model, "-n", "12", "--block", "8"]
    vanilla = document(capsys, *words)
    result = document(capsys, *words, "-p", "des-vote:beta=1")
    for name in ("text", "forwards", "experts", "vote_mass_kept"):
        assert result[name] == vanilla[name]


def test_a_seed_decides_what_is_drawn(capsys: Capture, model: str) -> None:
    words = [
        "generate",
        "5 17 33",
        "-m",
        model,
        "-n",
        "12",
        "--block",
        "8",
        "-t",
        "2",
        "--top-p",
        "0.9",
        "--seed",
    ]
    first, again, other = (document(capsys, *words, seed)["text"] for seed in ("1", "1", "2"))
    assert first == again != other


def test_a_greedy_answer_is_the_same_under_every_seed(capsys: Capture, model: str) -> None:
    words = ["generate", "5 17 33", "-m", model, "-n", "12", "--block", "8"]
    result = [document(capsys, *words, *seed)["text"] for seed in ([], ["--seed", "7"])]
    assert result[0] == result[1]


def test_a_comparison_with_vanilla_is_one_line(capsys: Capture, model: str) -> None:
    words = ["generate", "5 17 33", "-m", model, "-n", "8", "--block", "8", "-p", "racing:m=3"]
    assert run([*words, "--compare-vanilla"]) == 0
    text, line = capsys.readouterr().out.splitlines()
    pattern = r"racing:m=3 read \d+ of 16 experts a layer \(vanilla \d+\), 0\.\d\dx the bytes"
    assert re.match(pattern, line)
    result = document(capsys, *words, "--compare-vanilla")
    assert result["text"] == text
    assert 0 < result["vanilla"]["bytes_ratio"] < 1


def test_vanilla_compared_with_itself_is_the_same(capsys: Capture, model: str) -> None:
    assert (
        run(["generate", "5 17 33", "-m", model, "-n", "8", "--block", "8", "--compare-vanilla"])
        == 0
    )
    assert "1.00x the bytes; the same answer" in capsys.readouterr().out


def test_compare_runs_vanilla_first_and_each_policy_once(capsys: Capture, model: str) -> None:
    named = ["-p", "des-vote:beta=1", "-p", "racing:m=3", "-p", "racing:m=3", "-p", "vanilla"]
    result = document(capsys, "compare", "5 17 33", "-m", model, "-n", "12", "--block", "8", *named)
    assert result["prompt"] == "5 17 33"
    assert [r["policy"] for r in result["runs"]] == ["vanilla", "des-vote:beta=1", "racing:m=3"]
    assert [r["equals_vanilla"] for r in result["runs"]][:2] == [True, True]
    assert set(result["runs"][0]) == {*FIELDS[1:], "equals_vanilla"}


def test_compare_prints_one_line_a_policy(capsys: Capture, model: str) -> None:
    assert (
        run(["compare", "5 17 33", "-m", model, "-n", "8", "--block", "8", "-p", "racing:m=3"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["policy", "text", "experts"]
    assert [line.split()[0] for line in lines[1:3]] == ["vanilla", "racing:m=3"]


def test_inspect_reads_the_config_alone(capsys: Capture, model: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    result = document(capsys, "inspect", str(tmp_path), "--fit-gib", "8", "--dtype", "float32")
    assert (result["family"], result["experts"], result["experts_per_token"]) == ("llada2", 16, 4)
    assert result["expert_bytes"] == 3 * 32 * 16 * 4
    assert result["fits"] == [{"memory": 8 << 30, "experts_per_layer": 16}]
    assert run(["inspect", str(tmp_path)]) == 0
    assert "16 a layer, 4 a token" in capsys.readouterr().out


def test_inspect_names_the_experts_that_a_block_admits(capsys: Capture, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada2", expert_capacity=12)
    assert run(["inspect", str(tmp_path)]) == 0
    assert "of 12 that a block of 32 admits" in " ".join(capsys.readouterr().out.split())


def test_policies_lists_every_policy(capsys: Capture) -> None:
    assert [entry["name"] for entry in document(capsys, "policies")] == list(POLICIES)  # type: ignore[index]
    assert run(["policies"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in POLICIES)


def test_help_and_version_succeed(capsys: Capture) -> None:
    for words in ([], ["--help"], ["--version"], ["generate", "--help"], ["compare", "-h"]):
        assert run(words) == 0
    assert "coterie generate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["generate"], "Missing argument"),
        (["bogus"], "No such command 'bogus'; `coterie --help` lists them"),
        (["policies", "desvote"], "did you mean 'des-vote'?"),
        (["generate", "5", "--no-such-option"], "No such option"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "5 96"], "token id 96 is outside the vocabulary of 96"),
        (["generate", "95"], "the mask token"),
        (["generate", "5", "-p", "nope"], "unknown policy 'nope'; known: coreset"),
        (["generate", "5", "-p", "des-vote"], "needs beta"),
        (["generate", "5", "-p", "des-vote:beta=2"], "beta must be"),
        (["generate", "5", "-p", "des-vote:beta=nan"], "beta must be"),
        (["generate", "5", "-p", "des-vote:gamma=2"], "unknown option 'gamma'"),
        (["compare", "5", "-p", "nope"], "unknown policy 'nope'"),
        (["generate", "5", "-n", "-3"], "--max-new-tokens"),
        (["generate", "5", "-n", "0"], "--max-new-tokens"),
        (["generate", "5", "-n", "100000"], "the model has 512"),
        (["generate", "5", "--block", "0"], "--block"),
        (["generate", "5", "--kv-cache", "nope"], "unknown KV scheme 'nope'; known: block-causal"),
        (["generate", "5", "--unmask", "nope"], "unknown unmasking rule 'nope'"),
        (["generate", "5", "--unmask", "threshold:p=7"], "p must be above 0 and at most 1"),
        (["generate", "5", "--unmask", "threshold", "--threshold", "0.5"], "is short for"),
        (["generate", "5", "--threshold", "nan"], "threshold"),
        (["generate", "5", "--temperature", "-1"], "--temperature"),
        (["generate", "5", "--temperature", "nan"], "temperature"),
        (["generate", "5", "--top-k", "3"], "--top-k needs --temperature above 0"),
        (["generate", "5", "--top-p", "0.5"], "--top-p needs --temperature above 0"),
        (["generate", "5", "--temperature", "1e-9"], "temperature must be 0 (greedy) or at least"),
        (["generate", "5", "-n", "1" + "0" * 20], "the model has 512"),
        (["inspect", "--fit-gib", "inf"], "--fit-gib"),
        (["eval", "--num-problems", "1", "--out", "/dev/null/x"], "/dev/null/x: Not a directory"),
        (["eval", "--task", "chess"], "unknown task 'chess'; known: "),
        (
            ["eval", "--num-problems", "1", "--kv-cache", "uncached", "--commit-routing", "policy"],
            "commit",
        ),
        (["train", "--out", "/dev/null/x"], "/dev/null/x: Not a directory"),
        (["generate", "5", "-p", "coreset:m=4,beta=0.3"], "not beta and m"),
        (["generate", "5", "--seed", "-1", "-t", "1"], "--seed"),
        (["generate", "5", "--commit-routing", "maybe"], "--commit-routing"),
        (
            ["generate", "5", "--commit-routing", "policy", "--kv-cache", "uncached"],
            "commits no blocks",
        ),
        (
            ["generate", "5", "--prefill-routing", "policy", "--kv-cache", "uncached"],
            "every forward decodes",
        ),
        (["generate", "5", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["generate", "5", "--device", "tpu"], "unknown device 'tpu'"),
        (["generate", "5", "--device", "cuda:99"], "'cuda:99'"),
        (["generate", "5", "--watch"], "--watch needs a terminal"),
        (["generate", "5", "--watch", "--json"], "give one of them"),
        (["inspect", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["inspect", "--dtype", "int3"], "unknown dtype 'int3'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: Capture, model: str, words: list[str], complaint: str
) -> None:
    where = ["-m", model] if words[0] in ("generate", "compare") else []
    assert complaint in refusal(capsys, *words, *where)


def test_a_missing_model_is_named(capsys: Capture, tmp_path: Path) -> None:
    assert "nothing-here" in refusal(capsys, "generate", "5", "-m", str(tmp_path / "nothing-here"))
    assert "config.json" in refusal(capsys, "generate", "5", "-m", str(tmp_path))


def change_config(**keys: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return edit


def change_tensors(change: Callable[[dict], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def loop(name: str) -> Edit:
    """A link that leads nowhere, as a cache leaves it whose files were deleted."""

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    return edit


GATE = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.2.mlp.gate.expert_bias"
UP = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (change_config(surprise=1), "surprise"),
        (change_config(num_experts="many"), "num_experts"),
        (change_config(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
        (change_config(num_experts_per_tok=99), "num_experts_per_tok"),
        (change_config(hidden_size=64), "model.safetensors"),
        (change_config(rope_theta=10**400), "config.json: a number in it has more than 100"),
        (change_config(num_experts=16384, num_hidden_layers=4096), "num_experts is 16384 in 4095"),
        (change_tensors(lambda t: t[GATE][0].fill_(math.nan)), f"{GATE} holds NaN"),
        (change_tensors(lambda t: t[BIAS][:1].fill_(math.nan)), f"{BIAS} holds NaN"),
        (change_tensors(lambda t: t[UP][0].fill_(math.nan)), f"{UP} holds NaN"),
        (change_tensors(lambda t: t["lm_head.weight"].fill_(math.inf)), "lm_head.weight holds NaN"),
        (loop("config.json"), "config.json: cannot be read"),
        (loop("model.safetensors"), "model.safetensors: cannot be read"),
        (loop("model.safetensors.index.json"), "index.json: cannot be read"),
        (loop("tokenizer.json"), "tokenizer.json: "),
        (rewrite("config.json", lambda b: b[:-9]), "config.json"),
        (rewrite("config.json", lambda _: b"[]"), "config.json"),
        (change_tensors(lambda t: t.pop(GATE)), GATE),
        (change_tensors(lambda t: t.update(extra=t[GATE].clone())), "extra"),
        (change_tensors(lambda t: t.update({GATE: t[GATE][:3].clone()})), GATE),
        (rewrite("model.safetensors", lambda b: b[:-100]), "model.safetensors"),
        (rewrite("model.safetensors", lambda b: b[:50]), "model.safetensors"),
        (rewrite("model.safetensors", lambda _: b""), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(
    capsys: Capture, tmp_path: Path, damage: Edit, named: str
) -> None:
    damage(write_checkpoint(tmp_path, "llada2"))
    assert run(["generate", "5", "-m", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(named, line)


def test_a_prompt_may_come_from_standard_input(
    capsys: Capture, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("5 17 33\n")
    with (tmp_path / "prompt").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        result = document(capsys, "generate", "-", "-m", model, "-n", "9", "--block", "8")
    assert (
        result["text"]
        == document(capsys, "generate", "5 17 33", "-m", model, "-n", "9", "--block", "8")["text"]
    )


def test_text_without_a_tokenizer_is_bytes_with_one_remark(capsys: Capture, tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path, "llada2", vocab_size=300, eos_token_id=298))
    assert run(["generate", "Hi!", "-m", model, "-n", "4", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["prompt_tokens"] == 3
    assert printed.err == (
        "coterie: this model has no tokenizer: the prompt's UTF-8 bytes serve as token ids\n"
    )


def test_a_closed_stderr_does_not_lose_the_answer(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = str(write_checkpoint(tmp_path, "llada2", vocab_size=300, eos_token_id=298))
    monkeypatch.setattr(sys, "stderr", None)
    assert run(["generate", "Hi!", "-m", model, "-n", "4"]) == 0
    assert re.fullmatch(r"(\d+ )*\d+\n", capsys.readouterr().out)  # the remark is not on stdout
    assert run(["bogus"]) == 2


def test_watch_shows_block_and_experts_on_a_terminal(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as pool, open(theirs, "w", encoding="utf-8") as terminal:
        shown = pool.submit(read_all, ours)
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run(["generate", "5 17", "-m", model, "-n", "9", "--block", "8", "--watch"]) == 0
        terminal.close()
        text = shown.result()
    os.close(ours)
    assert "experts touched" in text
    assert "layer 2" in text
    assert "still masked" in text


def read_all(descriptor: int) -> str:
    """Everything that is written to a terminal until it closes, which Linux reports as an error."""
    result = b""
    while select.select([descriptor], [], [], 60)[0]:
        try:
            result += os.read(descriptor, 65536)
        except OSError:
            break
    return result.decode("utf-8", "replace")


def test_bytes_are_readable() -> None:
    assert [format_bytes(n) for n in (0, 1023, 6_291_456, 32_511_286_784)] == [
        "0 B",
        "1023 B",
        "6.00 MiB",
        "30.3 GiB",
    ]


def test_the_source_of_a_policy_stands_in_its_parenthesis() -> None:
    assert split_source("Votes ``twice`` (DES, Eq. 6).") == ("Votes twice.", "DES, Eq. 6")
    assert split_source("The unmodified model.") == ("The unmodified model.", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "hi", "-m", ""], "empty name"),
        (["generate", "hi", "-p", "policy.json"], "@policy.json reads it"),
        (["eval", "-o", "policy.json"], "exists, and is no folder"),
        (["bench", "forward", "--shape", "tiny", "-o", "policy.json"], "exists, and is no folder"),
        (["serve", "--deadline", "nan"], "--deadline"),
        (["serve", "--host", "nowhere.invalid", "--port", "0"], "no such address"),
    ],
)
def test_a_newcomers_mistake_is_named(
    words: list[str], expected: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("policy.json").write_text("{}")
    assert run(words) == 2
    message = capsys.readouterr().err
    assert re.search(expected, message)
    assert message.count("\n") == 1


def test_a_policy_with_options_is_explained_too(capsys: Capture) -> None:
    assert run(["policies", "des-vote:beta=0.3"]) == 0
    explained = capsys.readouterr().out
    assert run(["policies", "des-vote"]) == 0
    assert explained == capsys.readouterr().out
