"""The adapter for lm-evaluation-harness, run by the harness itself on a task from a local file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

import coterie
from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.lab.problems import PROBLEM_MAKERS, Problem, draw_problem

INSTALLED = find_spec("lm_eval") is not None
ADAPTER = "coterie.lab.evals.harness.adapter"
POLICY = "des-vote:beta=0.5"

needs_harness = pytest.mark.skipif(
    not INSTALLED, reason="lm-evaluation-harness is not installed: pip install '.[harness]'"
)


def problems(count: int) -> list[Problem]:
    rng = random.Random("lm-eval")
    return [draw_problem(PROBLEM_MAKERS["words"], rng, "test") for _ in range(count)]


def write_task(folder: Path, count: int) -> None:
    rows = [{"question": p.prompt, "answer": p.gold} for p in problems(count)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "words.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 96, "do_sample": False},
        "filter_list": [
            {
                "name": "last",
                "filter": [
                    {"function": "regex", "regex_pattern": "#### (-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "words.yaml").write_text(json.dumps(task))  # JSON is YAML


def harness(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, "-m", "coterie", "lm-eval", "--model", "coterie", *arguments],
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@needs_harness
def test_the_harness_reports_the_engines_answers(tmp_path: Path) -> None:
    write_task(tmp_path, 6)
    process = harness(
        tmp_path, "--model_args", f"policy={POLICY}", "--include_path", str(tmp_path),
        "--tasks", "local_words", "--batch_size", "4", "--apply_chat_template",
        "--log_samples", "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    engine = coterie.load(policy=POLICY, max_new_tokens=96)
    texts = [engine.generate(problem.prompt).text for problem in problems(6)]
    assert [sample["resps"][0][0] for sample in sorted(records, key=lambda s: s["doc_id"])] == texts
    num_correct = sum(f"#### {p.gold}" in t for p, t in zip(problems(6), texts, strict=True))
    document = json.loads(results.read_text())
    assert document["results"]["local_words"]["exact_match,last"] == pytest.approx(num_correct / 6)
    assert document["config"]["policy"] == POLICY
    assert num_correct >= 4


@pytest.mark.slow
@needs_harness
def test_choices_are_scored_and_unknown_arguments_refused(tmp_path: Path) -> None:
    write_task(tmp_path, 2)
    task = json.loads((tmp_path / "words.yaml").read_text())
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["1", "2"], "doc_to_target": 0}
    for name in ("filter_list", "generation_kwargs", "metric_list"):
        del task[name]
    (tmp_path / "words.yaml").write_text(json.dumps({**task, **choice}))
    arguments = ("--include_path", str(tmp_path), "--tasks", "local_words")
    process = harness(tmp_path, *arguments, "--model_args", "likelihood_samples=2")
    assert process.returncode == 0, process.stderr
    assert "bounds from 2 samples" in process.stderr
    process = harness(
        tmp_path, *arguments, "--model_args", "policy=des-vote:beta=0.3,voters=before-eos"
    )
    assert "model_args: unknown option 'voters'" in process.stderr
    assert "a policy with commas needs model_args in JSON" in process.stderr


@pytest.mark.slow
@needs_harness
def test_an_answer_ends_at_the_first_stop_string() -> None:
    script = """
from types import SimpleNamespace
from coterie.lab.evals.harness.adapter import CoterieLM
model = CoterieLM(batch_size=2, device="cpu")
prompt = model.apply_chat_template([{"role": "user", "content": QUESTION}])
texts = model.generate_until([
    SimpleNamespace(args=(prompt, {"until": until, "max_gen_toks": 64}))
    for until in ([], ["####"], "12", ["no such", "5 = 7"])
])
assert texts[0].endswith("#### 7"), texts
assert texts[1:] == [texts[0].split(stop)[0] for stop in ("####", "12", "5 = 7")], texts
warm = SimpleNamespace(args=(prompt, {"until": [], "temperature": 3.0, "do_sample": True}))
one, other = model.generate_until([warm, warm])
assert one != other
assert model.engine.rows == ()
"""
    question = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
    process = subprocess.run(
        [sys.executable, "-c", f"QUESTION = {question!r}\n{script}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


Main = Callable[[], None]


@pytest.fixture
def stub_harness(monkeypatch: pytest.MonkeyPatch) -> Callable[[Main], ModuleType]:
    """The adapter, imported with stubs of the harness's modules."""

    def load_adapter(main: Main) -> ModuleType:
        contents = {
            "lm_eval": {},
            "lm_eval.api": {},
            "lm_eval.__main__": {"cli_evaluate": main},
            "lm_eval.api.model": {"LM": type("LM", (), {})},
            "lm_eval.api.registry": {"register_model": lambda _name: lambda cls: cls},
            "tqdm": {"tqdm": MagicMock()},
        }
        for name, values in contents.items():
            module = ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "argv", [])
        monkeypatch.setitem(sys.modules, ADAPTER, ModuleType(ADAPTER))  # removed in the end
        del sys.modules[ADAPTER]
        return import_module(ADAPTER)

    return load_adapter


def test_likelihoods_come_in_the_order_of_the_requests(stub_harness: Any) -> None:
    """The right answer of each problem is more probable than that of another one."""
    options = {"likelihood_samples": 4, "batch_size": 3, "device": "cpu"}
    model = stub_harness(lambda: None).CoterieLM(**options)
    model.cache_hook = MagicMock()
    asked = problems(3)
    prompts = [model.apply_chat_template([{"role": "user", "content": p.prompt}]) for p in asked]
    pairs = [(prompt, problem.answer) for prompt in prompts for problem in asked]
    answers = model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    values = [value for value, _ in answers]
    rows = [values[i : i + 3] for i in range(0, 9, 3)]
    assert [row.index(max(row)) for row in rows] == [0, 1, 2]
    assert all(value < 0 for value in values)
    assert model.cache_hook.add_partial.call_count == len(pairs)
    info = model.get_model_info()
    assert info["likelihood_samples"] == 4
    assert info["likelihood_noise"] > 0


def test_a_rolling_likelihood_is_that_of_all_passages(stub_harness: Any) -> None:
    model = stub_harness(lambda: None).CoterieLM(likelihood_samples=1, device="cpu")
    model.cache_hook = MagicMock()
    text = problems(1)[0].prompt * 12
    short, long, empty = model.loglikelihood_rolling(
        [SimpleNamespace(args=(part,)) for part in (text[:20], text, "")]
    )
    assert long < short < empty == 0


@pytest.mark.parametrize(("uses_template", "warnings"), [(False, 1), (True, 0)])
def test_a_run_without_the_chat_template_warns(
    uses_template: bool, warnings: int, stub_harness: Any, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = stub_harness(lambda: None)
    model = object.__new__(adapter.CoterieLM)
    model.engine, model.uses_template = coterie.load(), uses_template
    assert model.generate_until([]) == []
    assert len(caplog.records) == warnings
    assert all("chat template" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voters": "before-eos"}, "unknown option 'voters'.*needs model_args in JSON"),
        ({"expert_memory": "35%", "batch_size": 2}, "batch_size is 2"),
        ({"batch_size": "0"}, "batch_size is 0"),
        ({"eviction": "lfu"}, "eviction has no effect"),
        ({"likelihood_samples": 0}, "likelihood_samples is 0"),
    ],
)
def test_bad_model_args_are_refused_before_a_model_is_loaded(
    options: dict[str, Any], message: str, stub_harness: Any
) -> None:
    with pytest.raises(CoterieError, match=message):
        stub_harness(lambda: None).CoterieLM("/no/such/folder", **options)


def test_answers_are_cut_at_stop_strings_and_come_in_the_order_of_the_requests(
    stub_harness: Any,
) -> None:
    model = stub_harness(lambda: None).CoterieLM(batch_size=2, device="cpu", max_gen_toks=64)
    model.cache_hook = MagicMock()
    question = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
    prompt = model.apply_chat_template([{"role": "user", "content": question}])
    stops = ([], ["####"], "12", ["no such", "5 = 7"])
    requests = [SimpleNamespace(args=(prompt, {"until": until})) for until in stops]
    whole, *cut = model.generate_until(requests)
    assert whole == model.engine.generate(question).text
    assert cut == [whole.split(stop)[0] for stop in ("####", "12", "5 = 7")]
    assert model.engine.rows == ()


@pytest.mark.skipif(INSTALLED, reason="the message without the harness")
def test_without_the_harness_the_command_names_the_extra(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["lm-eval", "--model", "coterie"]) == 2
    assert "pip install '.[harness]'" in capsys.readouterr().err
