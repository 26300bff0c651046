"""LLaDA2.0, 2.1 and 2.2: sigmoid router with bias and groups, block-causal attention."""

from __future__ import annotations

from dataclasses import replace

from coterie.families.common import (
    block_size,
    check_supported,
    expert_count,
    experts_per_token,
    layer_count,
    model_spec,
    read_block_size,
)
from coterie.families.config import ModelConfig
from coterie.families.family import Family, FamilyDefaults
from coterie.families.names import FUSED_QKV_NAMES
from coterie.model.spec import ModelSpec
from coterie.values import RouterSpec

BLOCK = 32
EDIT_IDS = {"delete_token_id": 156930, "split_token_id": 156931}
"""The config keys of the tokens with which LLaDA2.2 edits a block, and their released values."""

CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}"
    "<role>SYSTEM</role>{{ message.content }}\ndetailed thinking off<|role_end|>"
    "{% elif message.role == 'user' %}<role>HUMAN</role>{{ message.content }}<|role_end|>"
    "{% else %}<role>ASSISTANT</role>{{ message.content }}<|role_end|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def read_spec(config: ModelConfig) -> ModelSpec:
    """The spec of a config; raises ConfigError, with the key, if the family does not support it."""
    _check_supported(config)
    layers = layer_count(config)
    dense = config.optional_size("first_k_dense_replace", minimum=0) or 0
    if dense > layers:
        raise config.error("first_k_dense_replace", f"is {dense} of {layers} layers")
    return model_spec(
        config,
        _router(config),
        moe=tuple(layer >= dense for layer in range(layers)),
        dense_width="intermediate_size",
        expert_width="moe_intermediate_size",
        shared_width=_shared_width(config),
        expert_bias=config.flag("moe_router_enable_expert_bias", True),
        rotary_fraction=None,
    )


def _check_supported(config: ModelConfig) -> None:
    check_supported(config)
    for key in ("use_qkv_bias", "use_bias", "norm_head", "norm_softmax"):
        config.allow_only(key, False)
    config.allow_only("using_split_qkv_in_self_attention", False)
    config.allow_only("use_qk_norm", True)
    config.allow_only("use_rmsnorm", True)
    config.allow_only("norm_topk_prob", True)
    config.allow_only("score_function", "sigmoid")
    config.allow_only("router_dtype", "fp32", "float32", "torch.float32", None)
    config.allow_only("num_nextn_predict_layers", 0, None)


def _shared_width(config: ModelConfig) -> int:
    """Width of the shared expert: several shared experts act as one of their summed width."""
    expert_width = config.size("moe_intermediate_size")
    shared_width = config.optional_size("moe_shared_expert_intermediate_size")
    if shared_width not in (None, expert_width):
        raise config.error(
            "moe_shared_expert_intermediate_size", f"is {shared_width}, not {expert_width}"
        )
    return expert_width * (config.optional_size("num_shared_experts", minimum=0) or 0)


def _router(config: ModelConfig) -> RouterSpec:
    experts = expert_count(config)
    k = experts_per_token(config, experts)
    block = block_size(config, BLOCK)
    capacity = config.optional_size("expert_capacity", minimum=0) or None
    if capacity is None:
        groups, kept_groups = _groups(config, experts, k)
    else:
        groups = kept_groups = 1  # a model that routes by block ignores them
        for key in ("n_group", "topk_group"):
            config.get(key)  # read, so that it is no unknown key
        if not k <= capacity <= experts:
            problem = f"is {capacity}, not between {k} experts per token and {experts} experts"
            raise config.error("expert_capacity", problem)
    return RouterSpec(
        experts=experts,
        k=k,
        activation="sigmoid",
        renormalise=k > 1 or capacity is not None,
        scale=config.number("routed_scaling_factor", 1.0),
        groups=groups,
        topk_groups=kept_groups,
        epsilon=1e-20,
        capacity=capacity if capacity is not None and capacity < experts else 0,
        block=block,
    )


def _groups(config: ModelConfig, experts: int, k: int) -> tuple[int, int]:
    """The number of expert groups, and how many of them a token keeps."""
    groups, kept_groups = _group_counts(config)
    if experts % groups:
        raise config.error("n_group", f"is {groups}, no divisor of num_experts {experts}")
    if kept_groups > groups:
        raise config.error("topk_group", f"is {kept_groups}, more than n_group {groups}")
    group_size = experts // groups
    if groups > 1 and group_size < 2:
        raise config.error(
            "n_group", f"leaves {group_size} expert per group; a group's score needs two"
        )
    if k > kept_groups * group_size:
        raise config.error(
            "num_experts_per_tok", f"is {k}; {kept_groups} groups of {group_size} hold fewer"
        )
    return groups, kept_groups


def read_defaults(config: ModelConfig, defaults: FamilyDefaults) -> FamilyDefaults:
    """The defaults of a checkpoint: one that has DELETE and SPLIT tokens edits its blocks."""
    ids = [_edit_id(config, key) for key in EDIT_IDS]
    defaults = read_block_size(config, defaults)
    if ids == [None, None] and config.get("expert_capacity"):
        ids = [i if i < config.size("vocab_size") else None for i in EDIT_IDS.values()]
    if ids == [None, None]:
        return defaults
    delete_id, split_id = ids
    if delete_id is None or split_id is None or delete_id == split_id:
        raise config.error("delete_token_id", f"is {delete_id}, and split_token_id is {split_id}")
    return replace(defaults, edit_ids=(delete_id, split_id), unmask="joint-edit")


def _edit_id(config: ModelConfig, key: str) -> int | None:
    token = config.optional_size(key, minimum=0)
    if token is not None and token >= config.size("vocab_size"):
        raise config.error(key, f"is {token}, outside the vocabulary")
    return token


def _group_counts(config: ModelConfig) -> tuple[int, int]:
    """The number of expert groups, and of those that a token keeps; 0 or absent: no groups."""
    counts = [config.optional_size(key, minimum=0) for key in ("n_group", "topk_group")]
    if counts[0] == 0 or all(count in (None, 0, 1) for count in counts):
        return 1, 1
    return config.size("n_group"), config.size("topk_group")


FAMILY = Family(
    name="llada2",
    title="LLaDA2.x",
    architecture="LLaDA2MoeModelLM",
    model_types=("llada2_moe", "llada2_moe_veomni"),
    read_spec=read_spec,
    tensor_names=FUSED_QKV_NAMES,
    defaults=FamilyDefaults(
        block=BLOCK,
        block_causal=True,
        kv_cache="block-causal",
        unmask="threshold:p=0.9",
        mask_id=156895,
        eos_ids=(156892,),
        chat_template=CHAT_TEMPLATE,
    ),
    read_defaults=read_defaults,
)
