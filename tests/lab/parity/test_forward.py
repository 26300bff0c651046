"""One forward of every family equals the reference, and a damaged reference is never a pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from shared_data import golden, golden_sets

from coterie.lab.parity.forward import Deviation, forward_deviations

Arrays = dict[str, np.ndarray]


def folder_of(name: str) -> Path:
    return golden(*name.split("/"))


@pytest.mark.parametrize("name", golden_sets())
def test_a_forward_equals_the_reference(name: str) -> None:
    found = forward_deviations(folder_of(name))
    assert {d.name: d.max_error for d in found if not d.within_tolerance} == {}
    names = {"logits", "hidden_states", "layer_outputs", "router_logits", "topk_weights"}
    assert names | {"tokens with other experts"} <= {d.name for d in found}


def test_the_reference_without_blocks_is_compared_too() -> None:
    names = [d.name for d in forward_deviations(golden("llada2", "a"))]
    assert "logits, full attention" in names


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), 3e-4])
def test_nan_and_large_errors_exceed_the_tolerance(worst: float) -> None:
    assert not Deviation("logits", worst, 2e-4).within_tolerance


def copied(tmp_path: Path, change: Callable[[Arrays], None]) -> Path:
    """A copy of a golden folder with its arrays changed."""
    source = golden("llada2", "a")
    folder = shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    with np.load(source / "reference.npz") as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    change(arrays)
    np.savez(folder / "reference.npz", **arrays)
    return folder


def failing(folder: Path) -> set[str]:
    return {d.name for d in forward_deviations(folder) if not d.within_tolerance}


EVERY = (
    *("input_ids", "position_ids", "attention_mask_bool", "block_length", "moe_layer_index"),
    *("logits", "hidden_states", "layer_outputs", "topk_ids", "topk_weights", "router_logits"),
)
FLOATS = ("logits", "hidden_states", "layer_outputs", "topk_weights", "router_logits")


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_array_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is missing"):
        forward_deviations(copied(tmp_path, lambda arrays: arrays.pop(name)))


@pytest.mark.parametrize("name", EVERY)
def test_an_array_of_another_shape_is_an_error(tmp_path: Path, name: str) -> None:
    def cut(arrays: Arrays) -> None:
        arrays[name] = arrays[name][:1] if arrays[name].ndim else arrays[name][None]

    with pytest.raises(ValueError, match=r"reference\.npz"):
        forward_deviations(copied(tmp_path, cut))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [*FLOATS, "logits_fullattn"])
def test_a_reference_that_is_not_finite_is_an_error(
    tmp_path: Path, name: str, value: float
) -> None:
    def spoil(arrays: Arrays) -> None:
        arrays[name].reshape(-1)[-1] = value

    with pytest.raises(ValueError, match=f"{name} contains values that are not finite"):
        forward_deviations(copied(tmp_path, spoil))


@pytest.mark.parametrize(
    ("name", "by", "said"),
    [
        ("logits", 1e-3, "logits"),
        ("hidden_states", 2e-4, "hidden_states"),
        ("layer_outputs", 2e-4, "layer_outputs"),
        ("topk_weights", 1e-4, "topk_weights"),
        ("router_logits", 2e-4, "router_logits"),
        ("logits_fullattn", 1e-3, "logits, full attention"),
    ],
)
def test_one_number_beyond_tolerance_fails(tmp_path: Path, name: str, by: float, said: str) -> None:
    def shift(arrays: Arrays) -> None:
        arrays[name].reshape(-1)[7] += by

    assert failing(copied(tmp_path, shift)) == {said}


def test_one_other_expert_fails(tmp_path: Path) -> None:
    def exchange(arrays: Arrays) -> None:
        chosen = arrays["topk_ids"][1, 0, 3]
        chosen[0] = next(e for e in range(16) if e not in chosen)

    assert "tokens with other experts" in failing(copied(tmp_path, exchange))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("topk_ids", 16, "topk_ids are not all below"),
        ("topk_ids", -1, "topk_ids are not all below"),
        ("input_ids", 512, "input_ids are not all below"),
        ("position_ids", 7, "do not start at 0"),
        ("moe_layer_index", 0, "moe_layer_index is not"),
        ("attention_mask_bool", True, "attention_mask_bool is not the mask of"),
        ("block_length", 8, "attention_mask_bool is not the mask of"),
    ],
)
def test_arrays_at_odds_with_the_model_are_errors(
    tmp_path: Path, name: str, value: int, said: str
) -> None:
    def overwrite(arrays: Arrays) -> None:
        arrays[name][...] = value

    with pytest.raises(ValueError, match=said):
        forward_deviations(copied(tmp_path, overwrite))


@pytest.mark.parametrize("keep", [0, 100, 200_000])
def test_a_truncated_reference_is_an_error(tmp_path: Path, keep: int) -> None:
    folder = copied(tmp_path, lambda arrays: None)
    file = folder / "reference.npz"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"reference\.npz: not a readable npz file"):
        forward_deviations(folder)


def test_nan_weight_fails(tmp_path: Path) -> None:
    folder = copied(tmp_path, lambda arrays: None)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="layer"):
        forward_deviations(folder)
