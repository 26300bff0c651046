"""The plug-in in a stand-in for SGLang: what it routes, and when it stops the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.routing import Vanilla, parse_policy, route
from coterie.sglang import plugin
from coterie.values import RouterSpec, Scores

from . import stand_in_server as server
from .stand_in_server import BLOCK, EXPERTS, MASK, K, Request

POLICY = "des-vote:beta=0.3"
SPEC = RouterSpec(EXPERTS, K, "softmax", renormalise=True, epsilon=1e-20)
DENOISING = Request([1, MASK, 2, MASK], 4, [0] * 4)
COMMIT = Request([1, 2, 3, 4], 4, [0] * 4)
PROMPT = Request([5, 6, 7, 8], 0, [0] * 6)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that installs the plug-in with some variables, and returns a model runner."""

    def install(
        *,
        prepare: Callable[[], None] = lambda: None,
        network: torch.nn.Module | None = None,
        options: dict[str, Any] | None = None,
        **variables: str,
    ) -> Any:
        server.install(monkeypatch)
        prepare()
        for name, value in {"POLICY": POLICY, **variables}.items():
            monkeypatch.setenv(f"COTERIE_{name}", value)
        plugin.register()
        network = network or server.module("models.sdar_moe").SDARMoeForCausalLM()
        runner = server.module("model_executor.model_runner").ModelRunner(network, **options or {})
        runner.load_model()
        return runner

    monkeypatch.setattr(plugin, "version", lambda name: "0.6.0")
    return install


def forward(runner: Any, *requests: Request, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """The weights and ids of both layers."""
    batch_type = server.module("model_executor.forward_batch_info").ForwardBatch
    batch = type("Batch", (), {"reqs": requests})
    forward_batch = batch_type.init_new(batch, runner, **options)
    return runner.model.forward(forward_batch.input_ids, forward_batch.positions, forward_batch)


def engine_ids(request: Request, layer: int, *, voters: list[int] | None = None) -> Tensor:
    """The ids of the engine in a row on its own: by the policy with voters, else by the model."""
    positions = torch.arange(request.start, request.start + BLOCK)
    logits = server.random_logits()[torch.tensor(request.block)] + positions.unsqueeze(-1).sin()
    weights = None if voters is None else torch.tensor([voters]).float()
    scores = Scores(logits[None], SPEC, voters=weights, layer=layer)
    return route(scores, Vanilla() if voters is None else parse_policy(POLICY)).topk_ids


def test_only_denoised_rows_route_by_the_policy(installed: Any) -> None:
    for _, ids in forward(installed(), COMMIT, DENOISING, PROMPT):
        commit, denoising, prompt = ids.long().view(3, BLOCK, K)
        assert torch.equal(commit, engine_ids(COMMIT, 1))
        assert torch.equal(denoising, engine_ids(DENOISING, 1, voters=[1, 1, 1, 1]))
        assert torch.equal(prompt, engine_ids(PROMPT, 1))
        assert len(denoising.unique()) == K < len(engine_ids(DENOISING, 1).unique())


def test_prompt_tokens_of_the_block_vote_only_if_asked(installed: Any) -> None:
    request = Request([7, 3, 5, MASK], 4, [0] * 7)
    for answer, voters in (("no", [0, 0, 0, 1]), ("yes", [1, 1, 1, 1])):
        (_, ids), _ = forward(installed(PROMPT_VOTES=answer), request)
        assert torch.equal(ids.long(), engine_ids(request, 1, voters=voters))


def test_other_forwards_route_as_the_model_does(installed: Any) -> None:
    (_, ids), _ = forward(installed(), DENOISING, is_dllm=False)
    assert torch.equal(ids, engine_ids(DENOISING, 1))


def test_the_layers_take_their_own_shares(installed: Any) -> None:
    runner = installed(POLICY="des-vote:beta=0.25/0.5")
    used = [len(ids.unique()) for _, ids in forward(runner, DENOISING)]
    assert used[0] == 4 < used[1] <= 8


def test_counts_are_written(installed: Any, tmp_path: Path) -> None:
    runner = installed(COUNTS=str(tmp_path / "counts"), COUNTS_EVERY="2")
    for _ in range(4):
        forward(runner, DENOISING, PROMPT)
    first, second = map(json.loads, (tmp_path / "counts").read_text().splitlines())
    assert [layer["blocks"] for layer in first["layers"] + second["layers"]] == [1, 1, 3, 3]
    assert [layer["layer"] for layer in first["layers"]] == [1, 3]
    assert all(layer["experts"] == 4 for layer in second["layers"])


def test_a_model_whose_blocks_admit_experts_routes_inside_them(installed: Any) -> None:
    runner = installed()
    llada2 = server.module("models.llada2")
    block = llada2.LLaDA2MoeSparseMoeBlock(1)
    sizes = {"num_experts": EXPERTS, "top_k": K, "block_size": BLOCK, "expert_capacity": 8}
    vars(block).update(sizes, layer_id=1, correction_bias=torch.zeros(EXPERTS))
    logits = torch.randn(BLOCK, EXPERTS, generator=torch.Generator().manual_seed(1))
    runner.network.blocks[1] = Caller(lambda: block._block_topk(logits))
    weights, ids = forward(runner, DENOISING)[0]
    spec = RouterSpec(EXPERTS, K, "sigmoid", True, epsilon=1e-20, capacity=8, block=BLOCK)
    expected = route(Scores(logits[None], spec), parse_policy(POLICY))
    assert torch.equal(ids.long(), expected.topk_ids)
    assert torch.equal(weights, expected.topk_weights)


class Caller(torch.nn.Module):
    """A block whose experts come from a function."""

    def __init__(self, choose: Any) -> None:
        super().__init__()
        self.topk = lambda hidden, logits: choose()


def test_without_a_policy_nothing_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    server.install(monkeypatch)
    plugin.register()
    assert server.HookRegistry.hooks == []


STOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown policy": ("des-vot", {"POLICY": "des-vot"}),
    "an unknown variable": ("COTERIE_BETA", {"BETA": "1"}),
    "shares of another model": ("2 layers", {"POLICY": "des-vote:beta=0.1/0.2/0.3"}),
    "no diffusion": ("algorithm", {"options": {"dllm_algorithm": None}}),
    "a commit that is none": (
        "COTERIE_COMMIT",
        {"COMMIT": "vanilla", "options": {"dllm_algorithm": "JointThreshold"}},
    ),
    "parallel attention": ("data-parallel", {"options": {"attn_dp_size": 2}}),
    "parallel experts": ("moe-a2a-backend", {"options": {"moe_a2a_backend": "deepep"}}),
    "another model": ("Identity", {"network": torch.nn.Identity()}),
    "a runner that routes": (
        "moe-runner-backend triton",
        {"prepare": lambda: setattr(server.TopK, "bypasses", True)},
    ),
    "a hook that is not applied": (
        "did not apply",
        {"prepare": lambda: setattr(server.HookRegistry, "works", False)},
    ),
    "a function that moved": (
        "0.6.0 has no sglang.srt.layers.moe.topk.select_experts",
        {"prepare": lambda: delattr(server.module("layers.moe.topk"), "select_experts")},
    ),
    "a function that changed": (
        "sglang==0.5.23",
        {"prepare": lambda: setattr(server.module("layers.moe.topk"), "select_experts", print)},
    ),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_server_that_cannot_obey_stops_with_one_line(installed: Any, name: str) -> None:
    words, arguments = STOPS[name]
    with pytest.raises(SystemExit) as stopped:
        installed(**arguments)
    message = str(stopped.value)
    assert message.startswith("coterie: ")
    assert words in message
    assert "\n" not in message
