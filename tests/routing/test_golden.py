"""Router logits of the reference checkpoints give the experts and weights of the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from shared_data import golden, golden_sets

from coterie.routing import Vanilla, parse_policy, route
from coterie.values import RouterSpec, Scores


@pytest.mark.parametrize("name", golden_sets())
@pytest.mark.parametrize("policy", ["vanilla", "des-vote:beta=1", "des-seq:k=4", "topk:k=4"])
def test_reference_choices_and_weights(name: str, policy: str):
    for scores, ids, weights in reference(name):
        routing = route(scores, parse_policy(policy))
        assert torch.equal(routing.topk_ids, ids)
        torch.testing.assert_close(routing.topk_weights, weights, atol=1e-5, rtol=0)
        assert routing.used.sum() == len(ids.unique())


@pytest.mark.parametrize("name", golden_sets())
def test_a_row_of_the_reference_routes_alone_as_in_its_batch(name: str):
    for scores, ids, _ in reference(name):
        rows = [Scores(row[None], scores.router, bias=scores.bias) for row in scores.logits]
        assert torch.equal(torch.cat([route(row, Vanilla()).topk_ids for row in rows]), ids)


def reference(name: str) -> list[tuple[Scores, torch.Tensor, torch.Tensor]]:
    """(scores, ids [T, k], weights [T, k]) of every layer that routes."""
    folder = golden(*name.split("/"))
    router = router_of(json.loads((folder / "config.json").read_text()))
    arrays = np.load(folder / "reference.npz")
    layers = []
    for index, layer in enumerate(arrays["moe_layer_index"]):
        bias = bias_of(folder / "model.safetensors", int(layer))
        scores = Scores(torch.tensor(arrays["router_logits"][index]), router, bias=bias)
        ids, weights = (torch.tensor(arrays[f"topk_{part}"][index]) for part in ("ids", "weights"))
        layers.append((scores, ids.flatten(0, 1).long(), weights.flatten(0, 1)))
    return layers


def router_of(config: dict) -> RouterSpec:
    """An independent implementation: it must not use that of the families."""
    sigmoid = config.get("score_function") == "sigmoid"
    return RouterSpec(
        experts=config["num_experts"],
        k=config["num_experts_per_tok"],
        activation="sigmoid" if sigmoid else "softmax",
        renormalise=config["norm_topk_prob"],
        scale=config.get("routed_scaling_factor", 1.0),
        groups=config.get("n_group") or 1,
        topk_groups=config.get("topk_group") or 1,
        biased_weight=config.get("moe_router_enable_expert_bias", False) and not sigmoid,
        epsilon=1e-20 if sigmoid else 0.0,
    )


def bias_of(path: Path, layer: int) -> torch.Tensor | None:
    with safe_open(path, "pt") as tensors:
        names = [key for key in tensors.keys() if f".{layer}.mlp" in key and "expert_bias" in key]  # noqa: SIM118
        return tensors.get_tensor(names[0]).float() if names else None
