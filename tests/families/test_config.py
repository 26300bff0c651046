"""Keys that change nothing load to the same model; one that changes numbers is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_data import field_case, field_cases

from coterie.checkpoints.model_info import inspect
from coterie.errors import ConfigError, CoterieError
from coterie.families import Family, ModelConfig, detect_family
from coterie.model.spec import ModelSpec
from coterie.testing import FAMILY_CONFIGS, tiny_config

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HARMLESS: dict[str, list[object]] = {
    "rope_parameters": [None, ROPE, {"full_attention": ROPE}, {"rope_theta": 10000}, {}],
    "rope_scaling": [None, {"type": "default"}, {"rope_type": "default", "factor": 1.0}, ROPE],
    "layer_types": [None, ["full_attention"] * 3],
    "dtype": ["float32", "torch.float32", None],
    "torch_dtype": ["float32", "torch.float32", None],
    "quantization_config": [None, {}],
    "architectures": [None],
    "attention_bias": [False, None],
    "use_sliding_window": [False, None],
    "use_regular_causal": [False, None],
    "hidden_act": ["silu", "swish"],
    "_attn_implementation": ["sdpa", "flash_attention_2"],
    "_moe_implementation": ["fused", None],
    "sliding_window": [4096, None],
    "is_encoder_decoder": [False],
    "id2label": [{"0": "LABEL_0"}],
    "a_new_key": [None],
    "pruned_heads": [{}, None],
    "pretraining_tp": [1],
    "max_length": [20],
    "num_beams": [1, 4],
    "temperature": [0.7],
    "_flash_attn_2_enabled": [True],
}
HARMFUL: dict[str, list[object]] = {
    "rope_parameters": [
        {"rope_type": "yarn", "factor": 4.0},
        ROPE | {"rope_theta": 10001.0},
        ROPE | {"factor": 2.0},
        {"sliding_attention": ROPE, "full_attention": ROPE},
        7,
    ],
    "rope_scaling": [{"type": "yarn"}, {"rope_type": "linear", "factor": 2.0}, [1]],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 3, "full_attention"],
    "dtype": ["int8", "torch.float8_e4m3fn", 16],
    "quantization_config": [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"bits": 4, "group_size": 64},
        "int4",
    ],
    "quantization": [{"bits": 4, "group_size": 64}],
    "hidden_act": ["gelu"],
    "attention_bias": [True],
    "use_regular_causal": [True],
    "use_sliding_window": [True],
    "is_encoder_decoder": [True],
    "pruned_heads": [{"1": [0]}],
    "pretraining_tp": [2],
    "a_new_key": [0, False, ""],
}
METHODS = [
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "FP8"),
    ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    ({"bits": 4, "group_size": 128, "sym": True, "desc_act": False}, "GPTQ"),
    ({"quant_method": "awq", "bits": 4}, "AWQ"),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ({"load_in_4bit": True}, "bitsandbytes"),
    ({"bits": 4, "group_size": 64}, "MLX"),
    ({"bits": 4, "group_size": 128, "zero_point": True}, "AWQ"),
    ({"w_bit": 4, "q_group_size": 128, "version": "gemm"}, "AWQ"),
    ({"config_groups": {"group_0": {}}, "format": "pack-quantized"}, "compressed-tensors"),
    ({"fmt": "e4m3", "activation_scheme": "dynamic"}, "FP8"),
    ({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, "NVFP4"),
    ({"load_in_8bit": True}, "bitsandbytes"),
    ({"nbits": 4}, "HQQ"),
    ({"quant_method": "new-method"}, "new-method"),
]
families = st.sampled_from(sorted(FAMILY_CONFIGS))
LAYER_KEYS = ("rope_parameters", "rope_scaling", "layer_types")
"""Keys that DiffusionGemma has for each kind of layer, and not at the top."""
INNER_KEYS = ("attention_bias", "dtype", "layer_types", "quantization_config", "rope_scaling")
"""Keys that change numbers inside DiffusionGemma's ``text_config``, too."""


def read(values: dict) -> tuple[Family, ModelSpec]:
    config = ModelConfig(Path("config.json"), values)
    family = detect_family(config)
    return family, family.read_spec(config)


def harmless_keys() -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in HARMLESS.items()})


def tiny_with(family: str, keys: dict[str, object]) -> dict:
    left_out = {"diffusion-gemma": LAYER_KEYS, "llada-moe": ("architectures",)}.get(family, ())
    return tiny_config(family) | {k: v for k, v in keys.items() if k not in left_out}


@given(family=families, keys=harmless_keys())
def test_harmless_keys_load_to_the_same_model(family: str, keys: dict[str, object]) -> None:
    assert read(tiny_with(family, keys)) == read(tiny_config(family))


@given(families, harmless_keys(), st.sampled_from(list(HARMFUL)), st.data())
def test_one_harmful_key_among_harmless_ones_is_named(
    family: str, keys: dict[str, object], key: str, data: st.DataObject
) -> None:
    value = data.draw(st.sampled_from(HARMFUL[key]))
    with pytest.raises(ConfigError, match=key):
        read(tiny_with(family, keys) | {key: value})


@given(harmless_keys(), st.sampled_from(INNER_KEYS), st.data())
def test_a_harmful_key_of_the_text_model_is_named(
    keys: dict[str, object], key: str, data: st.DataObject
) -> None:
    values = tiny_with("diffusion-gemma", keys)
    value = data.draw(st.sampled_from(HARMFUL[key]))
    text = values["text_config"] | {key: value}
    with pytest.raises(ConfigError, match=key):
        read(values | {"text_config": text})


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS.keys() - {"diffusion-gemma"}))
def test_rope_values_may_stand_in_either_place(family: str) -> None:
    values = tiny_config(family)
    rope = {
        key: values.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in values
    }
    assert read(values | {"rope_parameters": rope}) == read(tiny_config(family))


@pytest.mark.parametrize("values", [{"n_group": 0, "topk_group": 0}, {"n_group": 1}, {}])
def test_a_config_without_groups_routes_over_all_experts(values: dict[str, int]) -> None:
    config = tiny_config("llada2")
    del config["n_group"], config["topk_group"]
    router = read(config | values)[1].router
    assert (router.groups, router.topk_groups) == (1, 1)


@pytest.mark.parametrize(("values", "title"), METHODS)
def test_a_foreign_quantisation_is_named_with_a_remedy(values: dict, title: str) -> None:
    with pytest.raises(ConfigError, match=rf"{title}.*coterie quantize"):
        read(tiny_config("llada2") | {"quantization_config": values})


@given(exponent=st.integers(0, 8))
def test_the_block_of_a_checkpoint_is_its_default(exponent: int) -> None:
    for family in ("sdar-moe", "llada-moe"):
        defaults = read(tiny_config(family) | {"block_size": 1 << exponent})[0].defaults
        assert defaults.block == 1 << exponent
    with pytest.raises(ConfigError, match="block_size is 24"):
        read(tiny_config("sdar-moe") | {"block_size": 24})


@pytest.mark.parametrize(
    "keys",
    [
        {"architectures": ["LLaDAMoEV2ModelLM"]},
        {"architectures": None, "model_type": "llada_moe_v2"},
        {"_name_or_path": "GSAI-ML/LLaDA-MoE-v2-30B-A3B-Instruct"},
        {"num_hidden_layers": 32, "hidden_size": 3072, "num_experts": 128},
        {"shared_expert_intermediate_size": 32, "norm_topk_prob": True},
    ],
)
def test_llada_moe_v2_is_refused_with_what_is_missing(keys: dict) -> None:
    with pytest.raises(ConfigError, match=r"LLaDA-MoE-v2.*missing"):
        read(tiny_config("llada-moe") | keys)


def test_a_type_that_dense_models_share_needs_its_architecture() -> None:
    with pytest.raises(ConfigError, match="architectures is missing or null"):
        read(tiny_config("llada-moe") | {"architectures": None})


@pytest.mark.parametrize(("folder", "expected"), field_cases("configs"))
def test_configs_of_the_field_end_as_expected(folder: str, expected: str) -> None:
    path = field_case("configs", folder)
    if not expected.startswith("refuse"):
        facts = inspect(path)
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if facts.family.name != "llada2" and "block_size" in values:
            assert facts.family.defaults.block == values["block_size"]
        if expected.endswith("no groups"):
            assert facts.spec.router.groups == 1
        return
    with pytest.raises(CoterieError) as raised:
        inspect(path)
    words = expected.removeprefix("refuse: ").removeprefix("names ").partition(" and ")[0]
    assert all(word in str(raised.value) for word in words.split())
