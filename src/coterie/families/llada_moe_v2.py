"""LLaDA-MoE-v2-30B-A3B: recognised in order to refuse it, until its config can be read."""

from __future__ import annotations

import re

from coterie.families.config import ModelConfig

NAME = re.compile(r"llada[-_]?moe[-_]?v2", re.IGNORECASE)
KIND = re.compile(r"llada[-_]?moe|llada$", re.IGNORECASE)
SIZES = {"num_hidden_layers": 32, "hidden_size": 3072, "num_experts": 128}

MISSING = (
    "looks like LLaDA-MoE-v2-30B-A3B, which is not supported yet; missing are the key of the "
    "factor on its routed experts, its renormalised router weights beside a shared expert, and "
    "its tensor names"
)


def check_not_llada_moe_v2(config: ModelConfig) -> None:
    """Raises ConfigError, with what is missing, for a config that looks like this model's."""
    architectures = config.values.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    for key, names in {
        "architectures": listed,
        "model_type": [config.values.get("model_type")],
        "_name_or_path": [config.values.get("_name_or_path")],
    }.items():
        if any(isinstance(name, str) and NAME.search(name) for name in names):
            raise config.error(key, MISSING)
    kinds = [*listed, config.values.get("model_type")]
    if any(isinstance(kind, str) and KIND.match(kind) for kind in kinds):
        _check_sizes(config)


def _check_sizes(config: ModelConfig) -> None:
    if all(config.values.get(key) == size for key, size in SIZES.items()):
        raise config.error("num_experts", MISSING)
    has_shared = config.values.get("shared_expert_intermediate_size") not in (None, 0)
    if has_shared and config.values.get("norm_topk_prob") is True:
        raise config.error("norm_topk_prob", MISSING)
