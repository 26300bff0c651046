"""Checks of a model that SGLang has loaded: whether the plug-in can route it, and really does."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from coterie.errors import ConfigError
from coterie.routing import check_layers
from coterie.sglang.expert_counts import ExpertTotals
from coterie.sglang.live_blocks import NO_REQUEST, BlockRules
from coterie.sglang.metrics import CountGauges
from coterie.sglang.server_hooks import MAX_REQUESTS, RoutedModel, ServerHooks
from coterie.sglang.settings import PluginSettings

EDITS = {"LowConfidence": False, "JointThreshold": True, "JointThresholdInDel": True}
"""The algorithms, and whether they may still change a block without masks."""

MODELS = ("LLaDA2MoeModelLM", "SDARMoeForCausalLM")

# Options of SGLang's command line.
ALGORITHM_OPTION = "--dllm-algorithm"
A2A_OPTION = "--moe-a2a-backend"
RUNNER_OPTION = "--moe-runner-backend triton"


def check_model(hooks: ServerHooks, runner: Any) -> RoutedModel:
    """What the hooks need of the model of a ``ModelRunner``.

    Raises ConfigError for a server that the plug-in cannot route, or if a layer does not call it.
    """
    overrides: Any = import_module("sglang.srt.arg_groups.overrides")
    options = overrides.resolving_view(runner.server_args)
    rules = _block_rules(hooks.settings, options, runner)
    if options.attn_dp_size > 1 or options.moe_a2a_backend != "none":
        raise ConfigError(
            "the tokens of a block must stay together: start without data-parallel attention "
            f"and without {A2A_OPTION}"
        )
    layers = _routing_layers(runner.model)
    check_layers(hooks.settings.policy, len(layers))
    _check_calls(hooks, layers, runner, options.moe_runner_backend)
    context: Any = import_module("sglang.srt.runtime_context")
    reports, indices = context.get_parallel().tp_rank == 0, sorted(layers)
    return RoutedModel(
        rules=rules,
        moe_indices={layer: index for index, layer in enumerate(indices)},
        fixed_lengths=torch.full((MAX_REQUESTS,), NO_REQUEST, device=runner.device),
        totals=ExpertTotals(tuple(indices), torch.device(runner.device)),
        gauges=CountGauges() if reports and options.enable_metrics else None,
        reports=reports,
    )


def _block_rules(settings: PluginSettings, options: Any, runner: Any) -> BlockRules:
    algorithm = options.dllm_algorithm
    if algorithm not in EDITS:
        raise ConfigError(
            f"the diffusion algorithm is {algorithm}; start with {ALGORITHM_OPTION} and one of "
            f"{', '.join(EDITS)}, or unset COTERIE_POLICY"
        )
    if EDITS[algorithm] and settings.commit == "vanilla":
        raise ConfigError(
            f"COTERIE_COMMIT=vanilla: {algorithm} has no forward that only writes keys; "
            "unset it, or use LowConfidence"
        )
    config: Any = import_module("sglang.srt.dllm.config")
    return BlockRules(
        mask_id=config.DllmConfig.from_server_args(runner.server_args).mask_id,
        route_commits=EDITS[algorithm] or settings.commit == "policy",
        route_prompts=settings.prefill == "policy",
        prompt_votes=settings.prompt_votes,
    )


def _routing_layers(network: torch.nn.Module) -> dict[int, Any]:
    """The MoE block of each layer that routes."""
    topk: Any = import_module("sglang.srt.layers.moe.topk")
    blocks = [block for block in network.modules() if isinstance(_topk(block), topk.TopK)]
    if type(network).__name__ not in MODELS or not blocks:
        raise ConfigError(
            f"{type(network).__name__} is none of {', '.join(MODELS)}; unset COTERIE_POLICY"
        )
    return {_topk(block).layer_id: block for block in blocks}


def _topk(block: torch.nn.Module) -> Any:
    return getattr(block, "topk", None)


def _check_calls(
    hooks: ServerHooks, layers: Mapping[int, Any], runner: Any, runner_backend: str
) -> None:
    """Raises ConfigError if a layer chooses experts without the hooks."""
    config = runner.model_config.hf_config
    hidden = torch.zeros(1, config.hidden_size, dtype=runner.dtype, device=runner.device)
    logits = torch.zeros(1, config.num_experts, device=runner.device)
    hooks.probed = called = set()
    try:
        for block in layers.values():
            if getattr(block, "use_block_routing", False):
                block._block_topk(logits)
            else:
                block.topk(hidden, logits)
    finally:
        hooks.probed = None
    if missed := sorted(layers.keys() - called):
        raise ConfigError(
            f"layer {missed[0]} chooses its experts inside the MoE runner ({runner_backend}), "
            f"where no policy applies; start with {RUNNER_OPTION}"
        )
    if any(block.topk.topk_config.num_shared_topk_slots for block in layers.values()):
        raise ConfigError("shared experts are fused into the routing; no policy applies there")
