"""SGLang in an environment of its own, and our engine, on the same tiny checkpoints."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from coterie.engine import engine as our_engine
from coterie.engine.engine import Engine
from coterie.testing import write_checkpoint

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
PYTHON = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".peers" / "sglang" / "bin" / "python"))
needs_sglang = pytest.mark.skipif(
    not PYTHON.exists(),
    reason="SGLang is not installed: `scripts/peers sglang` makes its environment",
)

BLOCKS = {"llada2": 8, "sdar-moe": 4, "llada2.2": 8}
# SGLang's table of models holds the mask tokens of the released ones.
MASK_IDS = {"llada2": 156895, "sdar-moe": 151669, "llada2.2": 156895}
LAST_TOKEN = 90  # of prompts and answers: weights of later tokens are 0
NEW_TOKENS, THRESHOLD = 24, 0.97
TINY_CONFIG = """from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "{model_type}"
"""


@dataclass(frozen=True)
class SglangAnswers:
    """The tokens of each step and prompt, the counts of all layers so far, and the metrics."""

    tokens: list[list[list[int]]]
    layers: list[list[dict[str, float]]]
    metrics: str


@cache
def sglang_checkpoint(family: str) -> Path:
    """A tiny checkpoint that SGLang and our engine load, with three layers."""
    folder = Path(mkdtemp(prefix="coterie-sglang-"))
    mask = MASK_IDS[family]
    options: dict[str, Any] = {"vocab_size": mask + 64, "mask_token_id": mask}
    if family != "sdar-moe":
        # SGLang's CPU path drops the scale.
        options["routed_scaling_factor"] = 1.0
    if family == "llada2.2":
        options |= {"block_size": BLOCKS[family]}
    write_checkpoint(folder, family, **options)
    _add_config(folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name == "lm_head.weight":
            # So large that all other tokens together are less than the rounding of fp32.
            weight[:LAST_TOKEN] *= 14
            weight[LAST_TOKEN:] = 0
        elif ".experts." in name and "down_proj" in name:
            weight.mul_(3)  # so that another choice of experts changes the answer
    save_file(weights, folder / "model.safetensors")
    return folder


def _add_config(folder: Path) -> None:
    """Adds what the released checkpoints contain and Transformers needs for an unknown type."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "configuration_tiny.TinyConfig"}
    if config["model_type"] == "llada2_moe":
        config |= dict.fromkeys(("norm_head", "use_bias", "use_qkv_bias"), False)
        config |= dict.fromkeys(("attention_dropout", "embedding_dropout"), 0.0)
    file.write_text(json.dumps(config), encoding="utf-8")
    code = TINY_CONFIG.format(model_type=config["model_type"])
    (folder / "configuration_tiny.py").write_text(code, encoding="utf-8")


def prompts(family: str, *, whole_blocks: bool = True, count: int = 20) -> list[list[int]]:
    """Random prompts of one to four blocks, or of any length up to that."""
    draw, block = random.Random(5), BLOCKS[family]
    lengths = [
        block * draw.randint(1, 4) if whole_blocks else draw.randint(1, 4 * block)
        for _ in range(count)
    ]
    return [[draw.randrange(LAST_TOKEN) for _ in range(length)] for length in lengths]


def run_sglang(
    family: str,
    steps: list[tuple[str, list[list[int]]]],
    variables: dict[str, str] | None = None,
    **options: object,
) -> SglangAnswers:
    """SGLang's answers; with ``variables`` the plug-in is installed."""
    job_file, environment = _prepare(family, steps, variables, options)
    done = _start(job_file, environment)
    job = json.loads(job_file.read_text(encoding="utf-8"))
    answers_file = Path(job["answers_file"])
    assert answers_file.exists(), done.stdout[-8000:] + done.stderr[-8000:]
    answers = json.loads(answers_file.read_text(encoding="utf-8"))
    steps_done = answers["steps"]
    return SglangAnswers(
        [step["tokens"] for step in steps_done],
        [step["layers"] for step in steps_done],
        answers["metrics"],
    )


def refused(family: str, variables: dict[str, str], **options: object) -> str:
    """What a server says that does not start."""
    job_file, environment = _prepare(family, [], variables, options)
    done = _start(job_file, environment)
    assert done.returncode != 0
    return done.stdout + done.stderr


def _start(job_file: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, FOLDER / "engine_driver.py", job_file],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def _prepare(
    family: str,
    steps: list[tuple[str, list[list[int]]]],
    variables: dict[str, str] | None,
    options: dict[str, object],
) -> tuple[Path, dict[str, str]]:
    """The file of a job, and the environment in which it runs."""
    folder = Path(mkdtemp(prefix="coterie-sglang-job-"))
    algorithm = folder / "algorithm.yaml"
    algorithm.write_text(f"block_size: {BLOCKS[family]}\nthreshold: {THRESHOLD}\n")
    job = {
        "engine": {**_engine_options(family, algorithm), **options},
        "steps": [{"policy": policy, "prompts": prompts} for policy, prompts in steps],
        "sampling": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
        **{name: str(folder / name) for name in ("policy_file", "counts_file", "answers_file")},
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    paths = [FOLDER / "environment", ROOT / "src"]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("COTERIE_")}
    environment |= {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1" if options.get("tp_size") == 2 else "0",
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than the test
    }
    if variables is not None:
        _write_metadata(folder)
        paths.append(folder)
        environment |= {
            "SWITCHED_POLICY": job["policy_file"],
            "COTERIE_COUNTS": job["counts_file"],
            "COTERIE_COUNTS_EVERY": "1",
            **variables,
        }
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    return folder / "job.json", environment


def _engine_options(family: str, algorithm: Path) -> dict[str, object]:
    return {
        "model_path": str(sglang_checkpoint(family)),
        "skip_tokenizer_init": True,
        "trust_remote_code": True,
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "disable_radix_cache": True,
        "enable_metrics": False,
        "dllm_algorithm": "LowConfidence",
        "dllm_algorithm_config": str(algorithm),
        "max_running_requests": 4,
        "max_total_tokens": 4096,
        "context_length": 512,
        "log_level": "info",
    }


def _write_metadata(folder: Path) -> None:
    """The entry points of pyproject.toml, as an installed package has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["entry-points"] | {
        "coterie.policies": {"switched": "switched_policy:SwitchedPolicy"}
    }
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    metadata = folder / f"coterie-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: coterie\nVersion: {project['version']}\n", encoding="utf-8"
    )


@cache
def our_model(family: str) -> Engine:
    return our_engine.load(
        sglang_checkpoint(family),
        dtype="float32",
        device="cpu",
        block=BLOCKS[family],
        unmask=f"dynamic:p={THRESHOLD}",
        max_new_tokens=NEW_TOKENS,
        early_stop="off",
    )
