"""The plug-in in a stand-in for SGLang: what it routes, and when it stops the server."""

from __future__ import annotations

import json
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

    def install(*, load: bool = True, network: Any = None, options: Any = None, **names: str) -> Any:
        server.install(monkeypatch)
        prepare = names.pop("prepare", None)
        if prepare:
            prepare()
        variables = {"POLICY": POLICY, **names}
        for name, value in variables.items():
            monkeypatch.setenv(f"COTERIE_{name}", value)
        plugin.register()
        runner = server.module("model_executor.model_runner").ModelRunner(network, **options or {})
        network or setattr(runner, "network", server.module("models.sdar_moe").SDARMoeForCausalLM())
        if load:
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
