"""Compares two denoising steps on canvases of random tokens with a reference (cases.json)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coterie.decoding.sampling import Sampling, propose
from coterie.decoding.unmask import BlockState, RenoiseRule
from coterie.errors import CheckpointError
from coterie.lab.parity.forward import Deviation
from coterie.loading.load import Model, load_model
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.routing import Vanilla
from coterie.strict_json import read_object
from coterie.values import NO_MASK, Window

CASES = "cases.json"
LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class CanvasCases:
    """The numbers of a cases.json. Each getter raises CheckpointError for a malformed value."""

    file: Path
    values: Mapping[str, object]

    def section(self, name: str) -> CanvasCases:
        value = self.values.get(name)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.file}: {name} is missing or no object")
        return CanvasCases(self.file, value)

    def sections(self, name: str) -> tuple[CanvasCases, ...]:
        values = self.values.get(name)
        if not isinstance(values, list) or not all(isinstance(v, Mapping) for v in values):
            raise CheckpointError(f"{self.file}: {name} is missing or no list of objects")
        return tuple(CanvasCases(self.file, value) for value in values)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Finite numbers of this shape; an axis of -1 may have any size."""
        try:
            tensor = torch.tensor(self.values.get(name), dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise CheckpointError(f"{self.file}: {name} is missing or no array") from None
        fits = tensor.ndim == len(shape) and all(
            size in (-1, actual) for size, actual in zip(shape, tensor.shape, strict=True)
        )
        if not fits or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.file}: {name} is not finite or not of shape {shape}")
        return tensor.to(dtype)

    def ids(self, name: str, vocabulary: int) -> Tensor:
        """[n] token ids."""
        ids = self.tensor(name, -1, dtype=torch.int64)
        if not len(ids) or not bool(((ids >= 0) & (ids < vocabulary)).all()):
            raise CheckpointError(f"{self.file}: {name} are not ids below {vocabulary}")
        return ids


@torch.inference_mode()
def canvas_deviations(folder: Path, device: str = "cpu") -> Iterator[Deviation]:
    """Run both steps of all cases in fp32, and the choice of tokens that a step keeps.

    Raises CheckpointError if a value is missing, has another shape or is not finite.
    """
    cases = CanvasCases(folder / CASES, read_object(folder / CASES))
    model = load_model(folder, dtype=torch.float32, device=device)
    for case in cases.sections("cases"):
        yield from _case_deviations(case, model)
    yield from _acceptance_deviations(cases.section("entropy_acceptance"))


def _case_deviations(case: CanvasCases, model: Model) -> Iterator[Deviation]:
    """Encodes the prompt, then decodes two canvases, the second after the reference's logits."""
    transformer, vocabulary = model.transformer, model.spec.vocabulary
    prompt = case.ids("prompt", vocabulary)
    canvases = [case.ids(f"canvas_{step}", vocabulary) for step in (1, 2)]
    start, stop = len(prompt), len(prompt) + len(canvases[0])
    cache = KVCache.allocate(model.spec, 1, stop, dtype=torch.float32, device=transformer.device)

    def forward(tokens: Tensor, start: int, block: int, expected: Tensor | None) -> Tensor:
        visible = torch.tensor([start + len(tokens)])
        window = Window(torch.tensor([start]), len(tokens), visible, block)
        context = ForwardContext(window, cache, Vanilla(), expected=expected, encodes=block == 1)
        return transformer(tokens[None].to(transformer.device), context)

    forward(prompt, 0, 1, None)
    expected = None
    for step, canvas in enumerate(canvases, start=1):
        logits = forward(canvas, start, 0, expected)
        theirs = case.tensor(f"logits_{step}", len(canvas), vocabulary)
        error = float((logits.cpu() - theirs).abs().max())
        yield Deviation(f"logits {step}, prompt of {start}", error, LOGITS_TOLERANCE)
        temperature = float(case.tensor("temperature"))
        given = theirs.to(transformer.device) / temperature
        expected = transformer.expected_embedding(given)[None]


def _acceptance_deviations(acceptance: CanvasCases) -> Iterator[Deviation]:
    logits = acceptance.tensor("logits", -1, -1)
    width = len(logits)
    greedy = propose(logits, Sampling(), NO_MASK, torch.Generator(), entropy=True)
    assert greedy.entropy is not None
    error = float((greedy.entropy - acceptance.tensor("entropy", width)).abs().max())
    yield Deviation("entropy", error, LOGITS_TOLERANCE)
    everywhere = torch.ones(width, dtype=torch.bool)
    state = BlockState(greedy, greedy.ids, everywhere, ~everywhere, NO_MASK, 0, width)
    by_bound = acceptance.section("accepted_by_bound")
    for text in by_bound.values:
        kept = RenoiseRule(bound=_bound(text, by_bound.file)).choose(state)
        differing = (kept.float() != by_bound.tensor(text, width)).sum()
        yield Deviation(f"tokens kept otherwise, bound {text}", float(differing), 0.0)


def _bound(text: str, file: Path) -> float:
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not 0 <= bound < math.inf:
        raise CheckpointError(f"{file}: accepted_by_bound names {text!r}, not a bound")
    return bound
