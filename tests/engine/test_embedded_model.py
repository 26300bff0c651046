"""The model in the package: what it can do, and that it needs its router to do it."""

import json
import random
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import coterie
from coterie.checkpoints.model_info import inspect
from coterie.lab.evals.report import summarize
from coterie.lab.evals.run import EvalResult, Variant, run_eval
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import open_tasks
from coterie.lab.problems import PROBLEM_MAKERS, draw_problem
from coterie.model.forward_context import ForwardContext
from coterie.routing import Vanilla
from coterie.telemetry import TensorRecorder
from coterie.values import Window

FOLDER = Path(str(files("coterie") / "embedded"))
LEAST = {"words": 0.85, "docstring": 0.95, "sentence": 0.95, "algebra": 0.85}
SEED = 20_261
QUESTION = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"


@cache
def engine() -> coterie.Engine:
    return coterie.load()


def exam(policy: str, count: int) -> EvalResult:
    tasks = open_tasks(list(PROBLEM_MAKERS), TaskOptions("llada2", count=count, seed=SEED))
    (sheet,) = run_eval(engine(), tasks, [Variant(policy)], None, batch_size=8)
    return sheet


def test_the_weights_are_small_and_whole():
    assert (FOLDER / "model.safetensors").stat().st_size <= 24 << 20
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LLaDA2MoeModelLM"]
    assert engine().model.spec.router.experts == 128


def test_inspect_equals_the_loaded_model(tmp_path):
    facts = inspect()
    assert (facts.mask_id, facts.eos_ids) == (engine().model.mask_id, engine().model.eos_ids)
    shutil.copytree(FOLDER, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mask_token_id": 5}))
    with pytest.raises(coterie.CoterieError, match="mask_token_id is 5, but tokenizer"):
        coterie.load(tmp_path / "model")


def test_the_question_of_the_demo_is_answered_with_its_work():
    result = engine().generate(QUESTION)
    assert "3 * 4 = 12" in result.text
    assert "12 - 5 = 7" in result.text
    assert result.text.endswith("#### 7")
    assert result.finish_reason == "stop"


def test_vanilla_touches_most_experts_and_a_coreset_its_budget():
    whole, elected = exam("vanilla", 2), exam("des-vote:beta=0.3", 2)
    assert whole.experts >= 0.55 * 128
    assert elected.experts <= 38
    assert engine().generate(QUESTION, policy="des-vote:beta=0.3").experts.max <= 38
    assert whole.vote_mass_kept == pytest.approx(1.0)
    assert elected.vote_mass_kept < 1.0


def test_no_expert_of_any_layer_is_idle():
    model = engine().model
    used = {layer: torch.zeros(128, dtype=torch.bool) for layer in model.spec.moe_layers}
    for ids in blocks_to_fill(8):
        trace = TensorRecorder()
        window = Window(torch.tensor([0]), len(ids), torch.tensor([len(ids)]), block=32)
        with torch.inference_mode():
            model.transformer(torch.tensor([ids]), ForwardContext(window, None, Vanilla(), trace))
        for layer, _, routing in trace.routings:
            used[layer] |= routing.used
    assert all(bool(layer.all()) for layer in used.values())


def blocks_to_fill(count: int) -> Iterator[list[int]]:
    """Held-out problems of every task as decoding meets them: text so far, then a masked block."""
    model, tokenizer = engine().model, engine().model.tokenizer
    rng = random.Random(SEED)
    for problem in [
        draw_problem(maker, rng, "test") for maker in PROBLEM_MAKERS.values() for _ in range(count)
    ]:
        prompt = tokenizer.encode(problem.prompt)
        ids = prompt + tokenizer.encode(problem.answer, raw=True)
        for start in range(len(prompt) // 32 * 32, len(ids), 32):
            known = ids[: max(start, len(prompt))]
            yield known + [model.mask_id] * (start + 32 - len(known))


@pytest.mark.parametrize("policy", ["des-vote:beta=1", "des-seq:k=8"])
def test_a_policy_that_leaves_everything_open_is_vanilla(policy):
    asked = QUESTION
    assert engine().generate(asked, policy=policy).tokens == engine().generate(asked).tokens


def test_a_sample_of_held_out_problems_is_answered():
    (line,) = summarize([exam("vanilla", 6)], list(PROBLEM_MAKERS))
    assert line.accuracy.value >= 0.8


@pytest.mark.slow
def test_two_hundred_held_out_problems_a_task_are_answered_as_claimed():
    (line,) = summarize([exam("vanilla", 200)], list(PROBLEM_MAKERS))
    for task, share in line.by_task.items():
        assert share.value >= LEAST[task], (task, share)
