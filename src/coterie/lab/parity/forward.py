"""Compares one forward with a reference folder (config.json, model.safetensors, reference.npz)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from coterie.errors import CheckpointError
from coterie.lab.parity.recorded import ReferenceArrays
from coterie.loading.load import Model, load_model
from coterie.model.attention import AttentionMetadata
from coterie.model.forward_context import ForwardContext
from coterie.routing import Vanilla
from coterie.telemetry import TensorRecorder
from coterie.values import Window

LOGITS_TOLERANCE = 2e-4
HIDDEN_TOLERANCE = 1e-4
WEIGHTS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Deviation:
    """The largest absolute error of one quantity. NaN is not within the tolerance."""

    name: str
    max_error: float
    tolerance: float

    @property
    def within_tolerance(self) -> bool:
        return self.max_error <= self.tolerance


def forward_deviations(folder: Path, device: str = "cpu") -> tuple[Deviation, ...]:
    """Run the reference's input in fp32 and compare all recorded quantities.

    Raises CheckpointError if a file or an array is missing, has another shape, is not finite, or
    contradicts config.json.
    """
    arrays = ReferenceArrays.of(folder / "reference.npz")
    model = load_model(folder, dtype=torch.float32, device=device)
    tokens = _tokens(arrays, model)
    causal = model.family.defaults.block_causal
    block = int(arrays.integers("block_length")) if causal else 0
    window = _window(tokens, block)
    _check_mask(arrays, model, window, tokens)
    recorder = TensorRecorder()
    logits = _forward(model, tokens, window, recorder)
    deviations = [
        _deviation(arrays, "logits", logits, LOGITS_TOLERANCE),
        *_hidden(arrays, model, tokens, recorder),
        *_routers(arrays, model, tokens, recorder),
    ]
    if "logits_fullattn" in arrays.arrays:
        full = _forward(model, tokens, _window(tokens, 0), TensorRecorder())
        deviation = _deviation(arrays, "logits_fullattn", full, LOGITS_TOLERANCE)
        deviations.append(replace(deviation, name="logits, full attention"))
    return tuple(deviations)


def _tokens(arrays: ReferenceArrays, model: Model) -> Tensor:
    """Input ids [B, T], at positions 0 to T - 1."""
    batch, length = arrays.shape("input_ids", 2)
    tokens = arrays.integers("input_ids", batch, length)
    if not bool(((tokens >= 0) & (tokens < model.spec.vocabulary)).all()):
        raise CheckpointError(f"{arrays.file}: input_ids are not all below {model.spec.vocabulary}")
    positions = arrays.integers("position_ids", batch, length)
    if not bool((positions == torch.arange(length)).all()):
        raise CheckpointError(f"{arrays.file}: position_ids do not start at 0")
    return tokens


def _window(tokens: Tensor, block: int) -> Window:
    batch, length = tokens.shape
    start, visible = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), length)
    return Window(start, length, visible, block)


def _check_mask(arrays: ReferenceArrays, model: Model, window: Window, tokens: Tensor) -> None:
    batch, length = tokens.shape
    reference_mask = arrays.booleans("attention_mask_bool", batch, 1, length, length)
    mask = AttentionMetadata.of(window, None, model.spec.attention[0], torch.device("cpu")).mask
    ours = torch.ones_like(reference_mask) if mask is None else mask[:, None]
    if not torch.equal(ours, reference_mask):
        raise CheckpointError(
            f"{arrays.file}: attention_mask_bool is not the mask of {model.family.title} "
            f"with blocks of {window.block}"
        )


@torch.inference_mode()
def _forward(model: Model, tokens: Tensor, window: Window, recorder: TensorRecorder) -> Tensor:
    """Logits [B, T, V] on the host."""
    context = ForwardContext(window, cache=None, policy=Vanilla(), recorder=recorder)
    device_tokens = tokens.to(model.transformer.device)
    return model.transformer(device_tokens, context).unflatten(0, tuple(tokens.shape)).cpu()


def _hidden(
    arrays: ReferenceArrays, model: Model, tokens: Tensor, recorder: TensorRecorder
) -> list[Deviation]:
    layers, shape = model.spec.layers, (*tokens.shape, model.spec.hidden)
    output_of = {layer: x.cpu().view(shape) for layer, x in recorder.outputs}
    outputs = torch.stack([output_of[layer] for layer in range(layers)])
    # The input of each layer, and the output of the final norm.
    hidden = torch.stack([output_of[layer] for layer in (*range(-1, layers - 1), layers)])
    return [
        _deviation(arrays, "hidden_states", hidden, HIDDEN_TOLERANCE),
        _deviation(arrays, "layer_outputs", outputs, HIDDEN_TOLERANCE),
    ]


def _routers(
    arrays: ReferenceArrays, model: Model, tokens: Tensor, recorder: TensorRecorder
) -> list[Deviation]:
    """Compares router logits, the selected experts as sets, and the weight of each expert."""
    router, layers = model.spec.router, model.spec.moe_layers
    shape = (len(layers), *tokens.shape)
    if arrays.integers("moe_layer_index", len(layers)).tolist() != list(layers):
        raise CheckpointError(f"{arrays.file}: moe_layer_index is not {list(layers)}")
    routings = [routing for _, _, routing in recorder.routings]
    ids = torch.stack([routing.topk_ids for routing in routings]).cpu().view(*shape, router.k)
    weights = torch.stack([routing.topk_weights for routing in routings]).cpu().view_as(ids)
    logits = torch.stack([scores.logits for _, scores, _ in recorder.routings]).cpu()
    expected = arrays.integers("topk_ids", *ids.shape)
    if not bool(((expected >= 0) & (expected < router.experts)).all()):
        raise CheckpointError(f"{arrays.file}: topk_ids are not all below {router.experts}")
    ours = torch.zeros(*shape, router.experts).scatter(-1, ids, weights)
    expected_weights = arrays.floats("topk_weights", *ids.shape).to(ours.dtype)
    theirs = torch.zeros_like(ours).scatter(-1, expected, expected_weights)
    differing = (ids.sort(-1).values != expected.sort(-1).values).any(-1).sum()
    return [
        _deviation(arrays, "router_logits", logits, HIDDEN_TOLERANCE),
        Deviation("tokens with other experts", float(differing), 0.0),
        Deviation("topk_weights", float((ours - theirs).abs().max()), WEIGHTS_TOLERANCE),
    ]


def _deviation(arrays: ReferenceArrays, name: str, ours: Tensor, tolerance: float) -> Deviation:
    theirs = arrays.floats(name, *ours.shape)
    return Deviation(name, float((ours - theirs).abs().max()), tolerance)
