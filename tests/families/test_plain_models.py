"""Checkpoints of many sizes against short code of their descriptions, in fp32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_strategies import gemma_keys, logits_in_parts, part_bounds, random_tokens, sizes
from plain_models import PlainGemma, PlainLLaDA22, accepted_by_entropy
from policy_strategies import law
from safetensors.torch import load_file

from coterie.lab.parity.canvas import CASES, canvas_deviations
from coterie.loading.load import load_model
from coterie.model.checkpoint import SINGLE_FILE
from coterie.testing import write_checkpoint


@st.composite
def llada22_keys(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(sizes())
    experts = keys["num_experts"]
    return keys | {
        "first_k_dense_replace": draw(st.integers(0, keys["num_hidden_layers"] - 1)),
        "expert_capacity": draw(st.integers(keys["num_experts_per_tok"], experts)),
        "block_size": draw(st.sampled_from((1, 2, 4, 16, 64))),
        "num_shared_experts": draw(st.integers(0, 2)),
        "moe_intermediate_size": draw(st.sampled_from((5, 16))),
        "routed_scaling_factor": draw(st.sampled_from((1.0, 2.5))),
    }


@given(llada22_keys(), st.integers(1, 40), st.integers(0, 9), st.data())
@law(25)
def test_llada22_of_any_size_is_its_description(
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, Any],
    length: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """Forwards of whole blocks, and of the unfinished last one, over a cache."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "llada2.2", seed, **keys)
    config, tensors = read_folder(folder)
    tokens, block = random_tokens(length, seed), keys["block_size"]
    model = load_model(folder, dtype=torch.float32, device="cpu")
    logits = logits_in_parts(model, tokens, data.draw(part_bounds(length, block)), block)
    expected = PlainLLaDA22(config, tensors).logits(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@given(gemma_keys(), st.lists(st.integers(1, 30), min_size=1, max_size=2), st.integers(0, 9))
@law(25)
def test_diffusion_gemma_of_any_size_is_its_description(
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, Any],
    prompts: list[int],
    seed: int,
) -> None:
    """Two steps, the second with self-conditioning, by the tool that compares reference folders."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "diffusion-gemma", seed, **keys)
    config, tensors = read_folder(folder)
    cases = [plain_case(config, tensors, length, seed) for length in prompts]
    logits = 3 * torch.randn(9, 20, generator=torch.Generator().manual_seed(seed))
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    bounds = ("0.0", "0.7", "3.0", "100.0")
    acceptance = {
        "logits": logits.tolist(),
        "entropy": entropy.tolist(),
        "accepted_by_bound": {text: accepted_by_entropy(entropy, float(text)) for text in bounds},
    }
    (folder / CASES).write_text(json.dumps({"cases": cases, "entropy_acceptance": acceptance}))
    deviations = list(canvas_deviations(folder))
    assert len(deviations) == 2 * len(prompts) + 1 + len(bounds)
    assert [each for each in deviations if not each.within_tolerance] == []


def plain_case(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], length: int, seed: int
) -> dict[str, object]:
    plain, temperature = PlainGemma(config, tensors), 0.7
    prompt, *canvases = (
        random_tokens(n, seed + n) for n in (length, *(config["canvas_length"],) * 2)
    )
    canvases[1] = canvases[1].roll(1)
    plain.encode(prompt)
    first = plain.decode(canvases[0], None)
    second = plain.decode(canvases[1], first / temperature)
    return {
        "prompt": prompt.tolist(),
        "canvas_1": canvases[0].tolist(),
        "canvas_2": canvases[1].tolist(),
        "logits_1": first.tolist(),
        "logits_2": second.tolist(),
        "temperature": temperature,
    }


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / SINGLE_FILE)
