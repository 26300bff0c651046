"""Measures the text model: bits of held-out text, and how it decodes under vanilla routing.

    python -m experiments text-model --model runs/text/model --corpus corpus

The folder of the model's run holds the tokens of the corpus (`coterie train --task text`).
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import coterie
from coterie.engine.observation import LayerObservation, observe_forwards
from coterie.lab.training.checkpoint import load_network
from coterie.lab.training.text import TextCorpus, held_out_bits
from experiments.records import new_parser, save_record

PROMPT_TOKENS, NEW_TOKENS = 64, 64
MASS = 0.9


def main(argv: Sequence[str]) -> int:
    parser = new_parser("text-model", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint of the text model")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args(argv)
    network = load_network(options.model)
    corpus = TextCorpus.open(options.corpus, options.model.parent, network.shape.vocab_size)
    num_bytes = int(corpus.sizes[corpus.held_out].sum())
    facts = {
        **held_out_bits(network, corpus),
        **_compressed_bits(options.corpus / "held-out"),
        "trigram_bits_per_byte": trigram_bits(corpus.train, corpus.held_out) / num_bytes,
        **_decoding_facts(options.model, corpus.held_out, options.prompts),
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    save_record(options.out, "Text model", ["text-model", *argv], facts=facts)
    return 0


def _compressed_bits(folder: Path) -> dict[str, float]:
    """Bits a byte of all held-out files in one stream."""
    content = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.txt")))
    sizes = {"gzip": len(gzip.compress(content, 9)), "xz": len(lzma.compress(content, preset=9))}
    return {f"{name}_bits_per_byte": 8 * size / len(content) for name, size in sizes.items()}


def trigram_bits(train: np.ndarray, test: np.ndarray) -> float:
    """Bits of ``test`` under a trigram of tokens with Witten-Bell interpolation."""
    probability = np.full(len(test), 1 / (1 + int(train.max())))
    for order in range(3):
        grams, contexts = _codes(train, order + 1), _codes(train, order)[: len(train) - order]
        test_grams = _codes(test, order + 1)
        test_contexts = _codes(test, order)[: len(test_grams)]
        kinds, gram_counts = np.unique(grams, return_counts=True)
        counts = _lookup(kinds, gram_counts, test_grams)
        totals = _lookup(*np.unique(contexts, return_counts=True), test_contexts)
        types = _lookup(*np.unique(kinds // 65536, return_counts=True), test_contexts)
        better = (counts + types * probability[order:]) / np.maximum(totals + types, 1)
        probability[order:] = np.where(totals > 0, better, probability[order:])
    return float(-np.log2(probability).sum())


def _codes(tokens: np.ndarray, length: int) -> np.ndarray:
    """Each run of ``length`` tokens as one number."""
    codes = np.zeros(len(tokens) - max(0, length - 1), np.int64)
    for i in range(length):
        codes = codes * 65536 + tokens[i : i + len(codes)]
    return codes


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


@dataclass
class _Activation:
    """Experts of each layer over blocks and steps; not frozen: it counts."""

    experts: int
    loads: dict[int, torch.Tensor] = field(default_factory=dict)  # by layer
    previous: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    touched: list[int] = field(default_factory=list)
    mass_experts: list[int] = field(default_factory=list)  # the fewest with 90 % of the weight
    cosines: list[float] = field(default_factory=list)

    def add(self, observation: LayerObservation) -> None:
        layer, ids = observation.layer, observation.routing.topk_ids.flatten()
        weights = observation.routing.topk_weights.flatten()
        load = torch.bincount(ids, minlength=self.experts).float()
        mass = torch.zeros(self.experts).index_add_(0, ids, weights).sort(descending=True).values
        self.loads[layer] = self.loads.get(layer, torch.zeros(self.experts)) + load
        self.touched.append(int((load > 0).sum()))
        self.mass_experts.append(int((mass.cumsum(0) < MASS * mass.sum()).sum()) + 1)
        block = (layer, observation.rows[0], observation.starts[0])
        if block in self.previous:
            self.cosines.append(float(F.cosine_similarity(self.previous[block], load, dim=0)))
        self.previous[block] = load


def _decoding_facts(folder: Path, held_out: np.ndarray, num_prompts: int) -> dict[str, object]:
    """How the model completes held-out text by the published rule, threshold 0.9."""
    engine = coterie.load(folder)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(held_out) - PROMPT_TOKENS, num_prompts)
    prompts = [held_out[start : start + PROMPT_TOKENS].tolist() for start in starts]
    experts = engine.model.spec.router.experts
    activation = _Activation(experts)
    results = observe_forwards(
        engine,
        prompts,
        activation.add,
        batch_size=1,
        max_new_tokens=NEW_TOKENS,
        unmask="threshold:p=0.9",
        early_stop="off",
    )
    return {
        "prompts": len(prompts),
        "forwards_per_block": sum(r.forwards for r in results) / sum(r.blocks for r in results),
        "touched_share": float(np.mean(activation.touched)) / experts,
        "experts_of_90_percent_mass": float(np.mean(activation.mass_experts)),
        "cosine_of_neighbouring_steps": float(np.mean(activation.cosines)),
        "idle_experts": {
            layer: int((load == 0).sum()) for layer, load in sorted(activation.loads.items())
        },
        "max_load_over_mean": {
            layer: float(load.max() / load.mean())
            for layer, load in sorted(activation.loads.items())
        },
        "sample": [r.text for r in results[:3]],
    }
