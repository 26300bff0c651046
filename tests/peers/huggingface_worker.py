"""Transformers and diffusers, under the Python of their own environment; imports nothing of ours.

Each line of input is a function of ``FUNCTIONS`` and its arguments as JSON, each line of output
its value or its error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

transformers = import_module("transformers")
diffusers = import_module("diffusers")


def logits(folder: str, tokens: list[int], block: int) -> dict[str, object]:
    """Logits of one forward [N, V], causal between blocks, or without blocks in full."""
    model = load(transformers.AutoModelForCausalLM, folder)
    position = torch.arange(len(tokens))
    seen = position[None] // block <= position[:, None] // block if block else position[None] >= 0
    mask = torch.zeros(len(tokens), len(tokens)).masked_fill(~seen, torch.finfo().min)
    with torch.no_grad(), topk_margin() as margin:
        output = model(torch.tensor([tokens]), attention_mask=mask[None, None], use_cache=False)
    return {"logits": output.logits[0].tolist(), "margin": min(margin)}


def canvas(
    folder: str, prompt: list[int], canvases: list[list[int]], temperature: float
) -> dict[str, object]:
    """DiffusionGemma's logits of two steps [N, V] after a prompt, the second self-conditioned."""
    model = load(transformers.DiffusionGemmaForBlockDiffusion, folder)
    first, second = (torch.tensor([tokens]) for tokens in canvases)
    with torch.no_grad(), topk_margin() as margin:
        step = model(input_ids=torch.tensor([prompt]), decoder_input_ids=first)
        conditioning = step.logits / temperature
        next_step = model(
            past_key_values=step.past_key_values,
            decoder_input_ids=second,
            self_conditioning_logits=conditioning,
        )
    steps = [output.logits[0].tolist() for output in (step, next_step)]
    return {"logits": steps, "margin": min(margin)}


def load(kind: Any, folder: str) -> nn.Module:
    """The model of a folder in fp32, with plain attention and experts one by one."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = kind.from_pretrained(
        folder, dtype=torch.float32, ignore_mismatched_sizes=True, **options
    )
    if model.config.model_type == "olmoe":
        norm_each_head(model, folder)
    return model.eval()


def norm_each_head(model: Any, folder: str) -> None:
    """OLMoE's norms span all heads. These have the weights of one head, as in LLaDA-MoE."""
    tensors = import_module("safetensors.torch").load_file(f"{folder}/model.safetensors")
    for index, layer in enumerate(model.model.layers):
        for name in ("q_norm", "k_norm"):
            weight = tensors[f"model.layers.{index}.self_attn.{name}.weight"]
            norm = type(getattr(layer.self_attn, name))(len(weight), eps=model.config.rms_norm_eps)
            norm.weight.data = weight
            each = nn.Sequential(nn.Unflatten(-1, (-1, len(weight))), norm, nn.Flatten(-2))
            setattr(layer.self_attn, name, each)


@contextmanager
def topk_margin() -> Iterator[list[float]]:
    """Distances between the last value that each ``torch.topk`` selects and the best it leaves."""
    topk, margins = torch.topk, []

    def measured(values: Tensor, k: int, **options: Any) -> Any:
        if k < values.shape[-1]:
            best = topk(values.detach(), k + 1, dim=-1).values
            margins.append(float((best[..., -2] - best[..., -1]).min()))
        return topk(values, k, **options)

    torch.topk = measured
    try:
        margins.append(float("inf"))
        yield margins
    finally:
        torch.topk = topk


def llada2_pipeline(
    prompt: list[int], logits: list[list[list[list[float]]]], options: dict[str, Any]
) -> dict[str, object]:
    """LLaDA2's pipeline: each block of the canvas after each of its forwards, and the new tokens.

    The model's logits in forward n of block b are ``logits[b][n]`` [width, V], whatever its input.
    """
    width = options["block_length"]
    forwards: dict[int, list[list[int]]] = defaultdict(list)

    def model(tokens: Tensor, **_: object) -> SimpleNamespace:
        block = tokens.shape[1] // width - 1
        output = torch.tensor(logits[block][len(forwards[block])])
        return SimpleNamespace(logits=output.repeat(1, block + 1, 1))

    def on_step(_: object, __: int, ___: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = state["block_x"][0].tolist()
        forwards[len(tokens) // width - 1].append(tokens[-width:])
        return {}

    pipeline = diffusers.LLaDA2Pipeline(model, diffusers.BlockRefinementScheduler())
    pipeline.set_progress_bar_config(disable=True)
    with topk_margin() as margin:
        output = pipeline(
            input_ids=torch.tensor([prompt]),
            output_type="seq",
            callback_on_step_end=on_step,
            **options,
        )
    blocks = [forwards[block] for block in sorted(forwards)]
    return {"blocks": blocks, "tokens": output.sequences[0].tolist(), "margin": min(margin)}


def entropy_bound(logits: list[list[float]], step: int, steps: int, bound: float) -> list[bool]:
    """The positions [N] that a step of DiffusionGemma's scheduler keeps, from logits [N, V]."""
    scheduler = diffusers.EntropyBoundScheduler(entropy_bound=bound)
    scheduler.set_timesteps(steps)
    sample = torch.zeros(1, len(logits), dtype=torch.int64)
    return scheduler.step(torch.tensor([logits]), step, sample).accepted_index[0].tolist()


def stable_and_confident(
    logits: list[list[list[float]]], stability: int, confidence: float
) -> list[bool]:
    """Whether DiffusionGemma's loop stops after each step, from logits [steps, N, V]."""
    module = import_module("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    stops = module.StableAndConfidentStoppingCriteria(stability, confidence)
    return [bool(stops(step.argmax(-1), step)[0]) for step in torch.tensor(logits)[:, None]]


FUNCTIONS: dict[str, Callable[..., object]] = {
    each.__name__: each
    for each in (logits, canvas, llada2_pipeline, entropy_bound, stable_and_confident)
}


def main() -> None:
    # Libraries print on standard output; that is redirected to the error stream.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"value": FUNCTIONS[request.pop("function")](**request)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=output, flush=True)


if __name__ == "__main__":
    main()
