"""A family reads its released configs whole, and refuses what it cannot be by file and key."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released_configs import LLADA2_FLASH, LLADA2_MINI, LLADA_MOE, RELEASED, SDAR

from coterie.checkpoints.model_info import GIB, inspect
from coterie.errors import CoterieError
from coterie.families import (
    FAMILIES,
    FamilyDefaults,
    ModelConfig,
    detect_family,
    eos_ids,
    mask_id,
)
from coterie.families.names import weight_map
from coterie.model.size import experts_that_fit, model_size
from coterie.model.spec import ModelSpec
from coterie.model.weights import weight_shapes
from coterie.testing import FAMILY_CONFIGS, random_tensors, read_spec, tiny_config
from coterie.values import NO_MASK

BF16 = torch.bfloat16
FILE = Path("config.json")


def spec_of(values: dict) -> ModelSpec:
    config = ModelConfig(FILE, values)
    return detect_family(config).read_spec(config)


def refusal(family: str, without: str = "", **keys: object) -> str:
    """What a config with these keys is refused with."""
    values = {k: v for k, v in tiny_config(family, **keys).items() if k != without}
    with pytest.raises(CoterieError) as raised:
        spec_of(values)
    message = str(raised.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_read_whole(name: str) -> None:
    assert spec_of(RELEASED[name]).moe_layers


def test_sizes_of_released_models() -> None:
    # The checkpoints hold the router in bf16 where it is kept in fp32 here.
    def as_stored(values: dict) -> int:
        return sum(2 * prod(shape) for shape in weight_shapes(spec_of(values)).values())

    biases = 19 * 256 * 2  # LLaDA2.1 stores them in fp32, 2.0 in bf16
    assert as_stored(LLADA2_MINI) in (32_511_286_784, 32_511_286_784 - biases)
    assert as_stored(SDAR) == 61_064_245_248
    assert round(as_stored(LLADA_MOE) / 2**20) == 14_032
    assert as_stored(LLADA2_FLASH) == pytest.approx(205.8e9, rel=1e-3)


def test_expert_sizes_equal_the_paper() -> None:
    experts = [
        model_size(spec_of(config), BF16).expert_bytes
        for config in (LLADA_MOE, LLADA2_MINI, LLADA2_FLASH, SDAR)
    ]
    assert experts == [12_582_912, 6_291_456, 25_165_824, 9_437_184]


def test_the_mini_model_is_read_as_it_is() -> None:
    spec = spec_of(LLADA2_MINI)
    assert (spec.layers, spec.moe_layers) == (20, tuple(range(1, 20)))
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.rotary_dim) == (16, 4, 128, 64)
    assert (spec.dense_width, spec.expert_width, spec.shared_width) == (5120, 512, 512)
    router = spec.router
    assert (router.experts, router.k, router.groups, router.topk_groups) == (256, 8, 8, 4)
    assert (router.activation, router.renormalise, router.scale) == ("sigmoid", True, 2.5)
    assert spec.expert_bias


def token_ids(values: dict, vocabulary: int) -> tuple[int | None, tuple[int, ...]]:
    config = ModelConfig(FILE, values)
    family = detect_family(config)
    return mask_id(config, family, vocabulary), eos_ids(config, family, vocabulary)


def test_mask_and_end_ids_follow_config_then_family() -> None:
    assert token_ids(LLADA2_MINI, 157184) == (156895, (156892,))
    assert token_ids(SDAR, 151936) == (151669, (151643, 151645))
    assert token_ids(tiny_config("llada2"), 96) == (95, (94,))
    ids = {"mask_token_id": 7, "eos_token_id": [3, 4]}
    assert token_ids(tiny_config("llada2") | ids, 96) == (7, (3, 4))
    assert token_ids(tiny_config("llada2", eos_token_id=None, pad_token_id=9), 96) == (95, (9,))


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_no_id_is_guessed_to_be_the_mask(family: str) -> None:
    default = read_spec(tiny_config(family))[0].defaults.mask_id
    expected = NO_MASK if default == NO_MASK else None
    assert token_ids(tiny_config(family) | {"mask_token_id": None}, 96)[0] == expected


@pytest.mark.parametrize("key", ["mask_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [True, -1, 96, 10**40, 3.0, "3", [[3]], {"id": 3}])
def test_token_ids_are_whole_numbers_of_the_vocabulary(key: str, value: object) -> None:
    with pytest.raises(CoterieError, match=rf"config\.json: {key} is"):
        token_ids(tiny_config("llada2") | {key: value}, 96)


def test_a_model_has_one_mask() -> None:
    with pytest.raises(CoterieError, match="mask_token_id is a list"):
        token_ids(tiny_config("llada2") | {"mask_token_id": [3, 4]}, 96)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@given(value=st.recursive(st.text() | st.integers() | st.floats(), st.lists, max_leaves=200))
def test_values_are_clipped_in_messages(family: str, value: object) -> None:
    assert len(refusal(family, vocab_size=[value, "\x1b" * 999])) < 500


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_weight_map_fills_every_weight_once(family: str, stacked: bool) -> None:
    known, spec = read_spec(tiny_config(family))
    filled = {name: torch.zeros(shape) for name, shape in weight_shapes(spec).items()}
    for place in weight_map(known.tensor_names, spec, stacked=stacked).values():
        region = filled[place.weight][place.region]
        assert tuple(region.shape) == place.shape
        region += 1
    assert all(bool((weight == 1).all()) for weight in filled.values())


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_both_layouts_hold_the_same_numbers(family: str) -> None:
    known, spec = read_spec(tiny_config(family))
    found = []
    for stacked in (False, True):
        tensors = random_tensors(tiny_config(family), 3, stacked=stacked)
        weights = {name: torch.zeros(shape) for name, shape in weight_shapes(spec).items()}
        for name, place in weight_map(known.tensor_names, spec, stacked=stacked).items():
            weights[place.weight][place.region] = tensors[name]
        found.append(weights)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_dense_llada_shares_the_model_type_and_is_refused_by_architecture() -> None:
    message = refusal("llada-moe", architectures=["LLaDAModelLM"])
    assert "LLaDAModelLM, a dense model" in message


@pytest.mark.parametrize("listed", [[], ["A", "B"], "LLaDA2MoeModelLM", ["Qwen3"], [7]])
def test_unknown_architectures_are_refused_with_the_known_ones(listed: object) -> None:
    assert ", ".join(FAMILIES) in refusal("llada2", architectures=listed)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_architecture_and_model_type_must_agree(family: str) -> None:
    assert "model_type is 'bert'" in refusal(family, model_type="bert")


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@given(key=st.text(st.characters(codec="ascii", categories=["Ll"])).map("new_{}".format))
def test_an_unknown_key_is_an_error_that_names_it(family: str, key: str) -> None:
    assert f"unknown key '{key}'" in refusal(family, **{key: 1})


def keys_of(family: str) -> list[str]:
    """Keys of sizes and numbers that the family requires."""
    keys = "vocab_size hidden_size num_hidden_layers num_attention_heads num_experts"
    keys += " num_experts_per_tok top_k_experts canvas_length"
    keys += " rms_norm_eps rope_theta max_position_embeddings"
    config = tiny_config(family)
    text = config.get("text_config", {})
    assert isinstance(text, dict)
    return [key for key in keys.split() if key in config or key in text]


@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family in FAMILY_CONFIGS for key in keys_of(family)]
)
@pytest.mark.parametrize("value", [0, -1, True, "8", None, float("nan"), [3]])
def test_sizes_and_numbers_must_be_what_they_are(family: str, key: str, value: object) -> None:
    assert f"{key} is" in refusal(family, **{key: value})


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        ("llada2", {"rotary_dim": 6}, "rotary_dim is 6, but partial_rotary_factor 0.5 of 8 is 4"),
        (
            "llada2",
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor is 1.5; it must be above 0 and at most 1",
        ),
        ("llada2", {"partial_rotary_factor": 0.4}, "rotates 3 of 8"),
        ("llada2", {"model_type": None}, "model_type is null, but"),
        ("llada2", {"n_group": 3}, "n_group is 3, no divisor of num_experts 16"),
        ("llada2", {"topk_group": 5}, "topk_group is 5, more than n_group 4"),
        ("llada2", {"n_group": 16, "topk_group": 8}, "a group's score needs two"),
        ("llada2", {"topk_group": 1, "num_experts_per_tok": 5}, "1 groups of 4 hold fewer"),
        ("llada2", {"num_experts_per_tok": 17}, "more than num_experts 16"),
        ("llada2", {"num_key_value_heads": 3}, "no divisor of num_attention_heads 4"),
        ("llada2", {"head_dim": None, "hidden_size": 30}, "no divisor of hidden_size 30"),
        ("llada2", {"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
        ("llada2", {"score_function": "softmax"}, 'supported: "sigmoid"'),
        ("llada2", {"norm_topk_prob": False}, "norm_topk_prob is false; supported: true"),
        ("llada2", {"use_qkv_bias": True}, "use_qkv_bias is true; supported: false"),
        ("llada2", {"use_bias": True}, "use_bias is true"),
        ("llada2", {"use_qk_norm": False}, "use_qk_norm is false"),
        ("llada2", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("llada2", {"hidden_act": "gelu"}, "hidden_act is"),
        ("llada2", {"router_dtype": "bf16"}, "router_dtype is"),
        ("llada2", {"first_k_dense_replace": 4}, "first_k_dense_replace is 4 of 3 layers"),
        ("llada2", {"first_k_dense_replace": 3}, "no layer has experts"),
        ("llada2", {"intermediate_size": None}, "intermediate_size is missing"),
        ("llada2", {"moe_shared_expert_intermediate_size": 8}, "is 8, not 16"),
        ("llada2", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        ("llada2", {"expert_capacity": 48}, "expert_capacity is 48"),
        ("llada2", {"moe_router_enable_expert_bias": 1}, "is 1, not true or false"),
        ("llada2", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ("llada2", {"num_hidden_layers": 10**9}, "between 1 and 4096"),
        ("llada2", {"vocab_size": 10**12}, "vocab_size is 1000000000000; it must lie between"),
        ("llada2", {"torch_dtype": "bfloat16"}, "'float32', but torch_dtype is 'bfloat16'"),
        ("llada2", {"use_regular_causal": True}, "use_regular_causal is true"),
        ("llada2", {"dtype": "int4"}, "dtype is"),
        ("llada2", {"quantization_config": {"bits": 4}}, "quantization_config says that"),
        ("llada-moe", {"moe_layer_freq": [1, 1]}, "lists 2 of 3 layers"),
        ("llada-moe", {"moe_layer_freq": [1, 2, 1]}, "not a list of 0 and 1"),
        ("llada-moe", {"moe_layer_freq": 1}, "not a list of 0 and 1"),
        ("llada-moe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("llada-moe", {"norm_topk_prob": True}, "norm_topk_prob is true"),
        ("llada-moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
        ("llada-moe", {"moe_router_score_function": "sigmoid"}, 'supported: "softmax"'),
        ("llada-moe", {"router_num_group": 4}, "router_num_group is 4"),
        ("llada-moe", {"attention_bias": True}, "attention_bias is true"),
        ("llada-moe", {"qk_layernorm": False}, "qk_layernorm is false"),
        ("llada-moe", {"head_dim": 16}, "head_dim is 16"),
        ("sdar-moe", {"mlp_only_layers": [3]}, "mlp_only_layers names layer 3 of 3"),
        ("sdar-moe", {"mlp_only_layers": "1"}, "not a list of layer numbers"),
        ("sdar-moe", {"decoder_sparse_step": 4}, "no layer has experts"),
        ("sdar-moe", {"attention_bias": True}, "attention_bias is true"),
    ],
)
def test_contradictory_keys_are_refused_by_name(family: str, keys: dict, said: str) -> None:
    assert said in refusal(family, **keys)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llada2", "n_group"),
        ("llada2", "topk_group"),
        ("llada2", "moe_intermediate_size"),
        ("llada-moe", "expert_intermediate_size"),
        ("sdar-moe", "moe_intermediate_size"),
    ],
)
def test_a_missing_key_is_named(family: str, key: str) -> None:
    assert refusal(family, without=key) == f"config.json: {key} is missing"


def test_a_rotary_part_must_be_stated_where_the_family_needs_it() -> None:
    message = refusal("llada2", without="partial_rotary_factor")
    assert message == "config.json: partial_rotary_factor is missing"


def test_sparse_steps_and_dense_layers_are_read_layer_by_layer() -> None:
    def layers(**keys: object) -> tuple[bool, ...]:
        return spec_of(tiny_config("sdar-moe") | keys).moe

    assert layers() == (True, True, True)
    assert layers(mlp_only_layers=[1]) == (True, False, True)
    assert layers(decoder_sparse_step=2) == (False, True, False)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "{\x00}", '{"a": 1, "a": 2}'])
def test_a_config_that_is_not_an_object_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CoterieError, match=r"config\.json: ") as raised:
        inspect(tmp_path)
    assert "\n" not in str(raised.value)


def test_facts_need_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA2_MINI))
    facts = inspect(tmp_path)
    assert facts.family.name == "llada2"
    assert facts.size.parameters == pytest.approx(16.26e9, rel=1e-3)
    assert facts.size.active_parameters == pytest.approx(1.44e9, rel=0.4)
    fits = {fit.memory // GIB: fit.experts for fit in facts.fits}
    assert fits[8] < fits[16] < fits[24] < 256
    assert fits[32] == fits[80] == 256


@given(memory=st.integers(0, 40 * GIB), length=st.integers(1, 8192))
def test_the_reported_fit_is_exact(memory: int, length: int) -> None:
    spec = spec_of(LLADA2_MINI)
    weight = model_size(spec, BF16)
    layers = len(spec.moe_layers)
    rest = weight.bytes - layers * weight.layer_expert_bytes + length * weight.kv_bytes_per_token
    fits = experts_that_fit(spec, BF16, memory=memory, length=length)
    assert (fits == -1) == (rest > memory)
    if fits >= 0:
        assert rest + fits * layers * weight.expert_bytes <= memory
    if 0 <= fits < spec.router.experts:
        assert rest + (fits + 1) * layers * weight.expert_bytes > memory


def test_rope_parameters_may_repeat_or_replace_the_keys_beside_them() -> None:
    plain = tiny_config("llada2")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    moved = {k: v for k, v in plain.items() if k not in ("rope_theta", "partial_rotary_factor")}
    for values in (plain, moved):
        assert spec_of({**values, "rope_parameters": rope}) == spec_of(plain)
    for key, value in (("rope_theta", 10001), ("rope_type", "yarn"), ("other", 1)):
        assert key in refusal("llada2", rope_parameters={**rope, key: value})


def test_a_model_that_routes_by_block_ignores_groups() -> None:
    keys = {"expert_capacity": 8, "n_group": None, "topk_group": 7}
    router = spec_of(tiny_config("llada2", **keys)).router
    assert (router.capacity, router.block, router.groups) == (8, 32, 1)
    assert spec_of(tiny_config("llada2", expert_capacity=16)).router.capacity == 0
    assert "expert_capacity is 3" in refusal("llada2", expert_capacity=3)
    assert "block_size is 24" in refusal("llada2", block_size=24)


def test_edit_tokens_make_a_checkpoint_edit_blocks() -> None:
    def defaults(**keys: object) -> FamilyDefaults:
        return detect_family(ModelConfig(FILE, tiny_config("llada2", **keys))).defaults  # type: ignore[arg-type]

    assert defaults().unmask == "threshold:p=0.9"
    both = defaults(delete_token_id=3, split_token_id=4, block_size=16)
    assert (both.unmask, both.edit_ids, both.block) == ("joint-edit", (3, 4), 16)
    released = defaults(expert_capacity=8, vocab_size=157184)
    assert released.edit_ids == (156930, 156931)
    assert defaults(expert_capacity=8).edit_ids is None
    assert "delete_token_id is None" in refusal("llada2", split_token_id=3)
    assert "delete_token_id is 96" in refusal("llada2", delete_token_id=96, split_token_id=3)
