"""DiffusionGemma's configs in both forms, its skipped tensors, and its answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import coterie
from coterie.checkpoints.model_info import inspect
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.families import ModelConfig, detect_family
from coterie.lab.bench.profiler import DENSE, PARTS, Stopwatch, timed_model
from coterie.loading.load import load_model
from coterie.model.checkpoint import SINGLE_FILE
from coterie.model.size import model_size
from coterie.model.spec import ModelSpec
from coterie.testing import tiny_config, write_checkpoint

FAMILY = "diffusion-gemma"
PROMPT = [5, 17, 33]


def spec_of(values: Mapping[str, object]) -> ModelSpec:
    config = ModelConfig(Path("config.json"), values)
    return detect_family(config).read_spec(config)


def text_of(config: Mapping[str, object]) -> dict[str, object]:
    text = config["text_config"]
    assert isinstance(text, dict)
    return text


def released_config() -> dict[str, object]:
    config = tiny_config(
        FAMILY,
        vocab_size=262144,
        hidden_size=2816,
        intermediate_size=2112,
        moe_intermediate_size=704,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 5,
        per_layer_config={
            str(layer): {"head_dim": 512, "num_key_value_heads": 2} for layer in range(5, 30, 6)
        },
        sliding_window=1024,
        num_experts=128,
        top_k_experts=8,
        max_position_embeddings=262144,
        canvas_length=256,
    )
    return dict(config)


def test_the_released_sizes_are_read_as_they_are() -> None:
    spec = spec_of(released_config())
    assert [layer for layer in range(30) if not spec.attention[layer].window] == [5, 11, 17, 23, 29]
    sliding, full = spec.attention[0], spec.attention[5]
    assert (sliding.kv_heads, sliding.head_dim, sliding.window) == (8, 256, 1024)
    assert (full.kv_heads, full.head_dim, full.rope_angles) == (2, 512, 64)
    assert (spec.qkv_rows(0), spec.qkv_rows(5)) == (32 * 256, 18 * 512)
    experts = 30 * 128 * spec.expert_parameters
    assert experts == pytest.approx(22.84e9, rel=1e-3)
    size = model_size(spec, torch.bfloat16)
    assert 25e9 < size.parameters < 26.5e9
    assert 3.5e9 < size.active_parameters < 4.5e9
    assert size.kv_bytes_per_token == 2 * 2 * (25 * 8 * 256 + 5 * 2 * 512)


def test_both_forms_of_the_config_are_one_model() -> None:
    config = released_config()
    text = {key: value for key, value in text_of(config).items() if key != "per_layer_config"}
    older = text | {"global_head_dim": 512, "num_global_key_value_heads": 2}
    assert spec_of(config | {"text_config": older}) == spec_of(config)


def test_the_model_type_is_enough() -> None:
    config = tiny_config(FAMILY)
    assert spec_of({k: v for k, v in config.items() if k != "architectures"}) == spec_of(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation is"),
        ({"layer_types": ["full_attention"]}, "layer_types is not a list of 3"),
        ({"layer_types": ["full_attention", "linear", "linear"]}, "layer_types is not"),
        ({"num_attention_heads": 3}, "no multiple of the KV heads"),
        ({"top_k_experts": 17}, "more than num_experts 16"),
        ({"head_dim": 7}, "RoPE needs an even number"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"rope_parameters": None}, "rope_parameters is missing"),
        ({"per_layer_config": {"2": {"new_key": 1}}}, "unknown key 'new_key'"),
        ({"text_config": 3}, "text_config is 3"),
    ],
)
def test_unsupported_configs_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(CoterieError, match=message):
        spec_of(tiny_config(FAMILY, **keys))  # type: ignore[arg-type]


def test_inspect_names_each_kind_of_attention_and_the_canvas(tmp_path: Path) -> None:
    lines = inspect(write_checkpoint(tmp_path / "model", FAMILY)).describe()
    assert [value for name, value in lines if name in ("heads", "canvas")] == [
        "4 of 8, 2 for keys and values, in 2 layers, which see 6 positions",
        "4 of 16, 1 for keys and values, in 1 layer",
        "8 tokens",
    ]


def test_weights_of_the_vision_tower_are_skipped_and_no_others(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", FAMILY)
    tensors = load_file(folder / SINGLE_FILE)
    vision = {
        "model.encoder.vision_tower.patch.weight": torch.ones(2, 2),
        "model.encoder.embed_vision.weight": torch.ones(2),
    }
    save_file(tensors | vision, folder / SINGLE_FILE)
    assert load_model(folder).spec == spec_of(tiny_config(FAMILY))
    save_file(tensors | {"model.encoder.audio_tower.weight": torch.ones(2)}, folder / SINGLE_FILE)
    with pytest.raises(CoterieError, match="audio_tower"):
        load_model(folder)


def test_the_two_layer_scales_belong_to_two_kinds_of_passes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", FAMILY)
    tensors = load_file(folder / SINGLE_FILE)
    for layer in range(3):
        tensors[f"model.encoder.language_model.layers.{layer}.layer_scalar"].fill_(2 + layer)
        tensors[f"model.decoder.layers.{layer}.layer_scalar"].fill_(7 + layer)
    save_file(tensors, folder / SINGLE_FILE)
    scales = [vars(layer)["scales"].tolist() for layer in load_model(folder).transformer.layers]
    assert scales == [[2, 7], [3, 8], [4, 9]]


@pytest.mark.parametrize("policy", ["des-vote:beta=1", "des-seq:k=4"])
def test_a_policy_that_keeps_all_experts_is_the_model(tmp_path: Path, policy: str) -> None:
    engine = coterie.load(write_checkpoint(tmp_path / "model", FAMILY), max_new_tokens=8)
    plain, kept = engine.generate(PROMPT), engine.generate(PROMPT, policy=policy)
    assert (plain.tokens, plain.forwards) == (kept.tokens, kept.forwards)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (FAMILY, {"unmask": "threshold"}),
        (FAMILY, {"kv_cache": "block-causal"}),
        ("llada2", {"unmask": "renoise"}),
        ("llada2", {"kv_cache": "encoder"}),
    ],
)
def test_masks_and_noise_do_not_mix(tmp_path: Path, family: str, options: dict[str, str]) -> None:
    engine = coterie.load(write_checkpoint(tmp_path / "model", family))
    ((name, value),) = options.items()
    with pytest.raises(CoterieError, match=rf"`{name}` {value}.*the model denoises.*own is used"):
        engine.generate(PROMPT, **options)  # pyright: ignore[reportCallIssue]
    assert engine.rows == ()


def test_a_timed_model_answers_as_the_model_does(tmp_path: Path) -> None:
    engine = coterie.load(write_checkpoint(tmp_path / "model", FAMILY))
    watch = Stopwatch(torch.device("cpu"))
    timed = Engine(timed_model(engine.model, watch), generation=engine.generation)
    with watch(PARTS[-1]):
        found = timed.generate(PROMPT, max_new_tokens=8)
    assert found.tokens == engine.generate(PROMPT, max_new_tokens=8).tokens
    assert set(watch.laps) >= set(PARTS) - {DENSE}
