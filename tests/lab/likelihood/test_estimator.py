"""The bound against exact values, recorded logits and the laws of pairing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from shared_data import golden, golden_sets
from tiny_models import family_generation, tiny_model
from torch import Tensor

from coterie.engine.engine import Engine, load
from coterie.errors import TaskError
from coterie.lab.evals.stats import Z_95, ratio_interval
from coterie.lab.evals.text import BitsEstimate, paired_nats
from coterie.lab.likelihood.corruption import MaskedTokens, NoisyTokens
from coterie.lab.likelihood.estimator import LikelihoodEstimator, Passage
from coterie.model.forward_context import ForwardContext
from coterie.routing import Vanilla
from coterie.values import Window

MASK = 95
FAMILIES = ("llada2", "llada2.2", "sdar-moe", "llada-moe", "diffusion-gemma")


def tiny_engine(family: str, block: int = 4) -> Engine:
    generation = family_generation(family).replace(block=block)
    return Engine(tiny_model(family), generation=generation)


def passage(name: str, length: int, given: int = 0) -> Passage:
    generator = torch.Generator().manual_seed(length)
    return Passage(name, tuple(torch.randint(90, (length,), generator=generator).tolist()), given)


def fixed(monkeypatch: pytest.MonkeyPatch, cls: type, draw: Callable[..., object]) -> None:
    monkeypatch.setattr(cls, "draw", staticmethod(draw))


def logits_of(engine: Engine, tokens: Tensor, block: int) -> Tensor:
    """[W, V] from one forward of all tokens, without a KV cache."""
    width = len(tokens)
    window = Window(torch.tensor([0]), width, torch.tensor([width]), block)
    return engine.model.transformer(tokens[None], ForwardContext(window, None, Vanilla()))


def exact_nats(engine: Engine, text: Passage, block: int) -> float:
    """As LLaDA's Eq. 6 has it: L / l times the nats of l masked tokens, for l uniform in 1 .. L."""
    ids, total, width = torch.tensor(text.ids), 0.0, block or len(text.ids)
    for start in range(0, len(ids), width):
        stop = min(start + width, len(ids))
        scored = range(max(start, text.given), stop)
        for count in range(1, len(scored) + 1):
            values = []
            for masked in combinations(scored, count):
                tokens = torch.full((start + width,), MASK)
                tokens[:stop] = ids[:stop]
                tokens[list(masked)] = MASK
                nats = logits_of(engine, tokens, block).double().log_softmax(-1)
                values.append(-sum(float(nats[i, ids[i]]) for i in masked))
            total += float(np.mean(values)) / count
    return total


@pytest.mark.parametrize(("family", "block", "length", "given"), [
    ("llada2", 4, 8, 0), ("sdar-moe", 4, 7, 2), ("llada-moe", 0, 5, 1),
])  # fmt: skip
def test_the_interval_covers_the_exact_value(
    family: str, block: int, length: int, given: int
) -> None:
    """In about 95 % of 200 runs, which are rows of one batch with different corruptions."""
    engine = tiny_engine(family)
    exact = exact_nats(engine, passage("", length, given), block) / math.log(2)
    runs = [passage(f"run {i}", length, given) for i in range(200)]
    [scores] = LikelihoodEstimator(engine, samples=32).score(runs, ["vanilla"])
    estimates = [BitsEstimate.of([score.nats], [1]) for score in scores]
    covered = sum(abs(each.value - exact) <= Z_95 * (each.noise or 0) for each in estimates)
    assert 180 <= covered <= 199
    means = [score.mean_nats / math.log(2) for score in scores]
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    assert abs(np.mean(means) - exact) < 4 * error


@pytest.mark.parametrize(("family", "block"), [("llada2", 4), ("llada2.2", 32), ("sdar-moe", 4)])
def test_cached_keys_give_the_logits_of_a_forward_without_a_cache(
    family: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of LLaDA2.2 are those that admit experts."""
    engine, text = tiny_engine(family, block), passage("a", 3 * block - 1, given=2)

    def draw(tokens: Tensor, scored: Tensor, mask_id: int, _: object) -> MaskedTokens:
        return MaskedTokens.of(tokens, scored, scored[::2], mask_id)

    fixed(monkeypatch, MaskedTokens, draw)
    [[score]] = LikelihoodEstimator(engine).score([text], ["vanilla"])
    ids, expected = torch.tensor(text.ids), 0.0
    for start in range(0, len(ids), block):
        scored = torch.arange(max(start, text.given), min(start + block, len(ids)))
        masked = scored[::2]
        tokens = torch.full((start + block,), MASK)
        tokens[: len(ids)] = ids[: start + block]
        tokens[masked] = MASK
        nats = logits_of(engine, tokens, block).double().log_softmax(-1)
        expected -= float(nats[masked, ids[masked]].sum()) * len(scored) / len(masked)
    assert score.nats[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_the_other_passages_or_policies(family: str) -> None:
    estimator = LikelihoodEstimator(tiny_engine(family), samples=2)
    texts = [passage("a", 12), passage("b", 7, 2), passage("c", 4, 3), passage("d", 12, 5)]
    policies = ["vanilla", "topk:k=1", "des-vote:beta=1.0"]
    together = estimator.score(texts, policies)
    for row, text in enumerate(texts):
        for column, policy in enumerate(policies):
            [[alone]] = estimator.score([text], [policy])
            assert together[column][row].nats == pytest.approx(alone.nats, rel=1e-4)
    assert together[0] == together[2]  # a full coreset is vanilla
    assert together[0] != together[1]


def test_commits_under_a_policy_change_the_keys_of_later_blocks_only() -> None:
    engine, policy = tiny_engine("llada2"), "topk:k=1"
    one_block, two_blocks = passage("a", 4), passage("b", 8)
    before = LikelihoodEstimator(engine).score([one_block, two_blocks], [policy])[0]
    engine.generation = engine.generation.replace(commit_routing="policy")
    after = LikelihoodEstimator(engine).score([one_block, two_blocks], [policy])[0]
    assert after[0].nats == pytest.approx(before[0].nats)
    assert after[1].nats != pytest.approx(before[1].nats)


def test_shared_corruptions_narrow_the_paired_interval() -> None:
    """At least 5 times, against two policies with their own corruptions."""
    engine = load(device="cpu")
    ids = engine.model.tokenizer.encode(
        "Tom has 3 boxes of 4 pens and gives away 5. " * 40, raw=True
    )
    texts = [Passage(str(i), tuple(ids[i * 32 : i * 32 + 32])) for i in range(len(ids) // 32)]
    policies = ["vanilla", "des-vote:beta=0.5"]
    first, other = LikelihoodEstimator(engine).score(texts, policies)
    [[unpaired]] = [LikelihoodEstimator(engine, seed=9).score(texts, policies[1:])]
    ones = [1.0] * len(texts)
    widths = []
    for scores in (other, unpaired):
        low, high = ratio_interval([each[0] for each in paired_nats(first, scores)], ones)
        widths.append(high - low)
    assert 0 < 5 * widths[0] < widths[1]


@pytest.mark.parametrize("name", golden_sets())
def test_the_likelihood_is_that_of_recorded_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any tokens can be the text where the input has masks."""
    folder = golden(*name.split("/"))
    arrays = np.load(folder / "reference.npz")
    engine = load(folder, dtype="float32", device="cpu")
    full = not engine.model.family.defaults.block_causal
    block = 20 if full else int(arrays["block_length"])
    engine.generation = engine.generation.replace(block=block)
    for inputs, logits in zip(arrays["input_ids"], arrays["logits"], strict=True):
        masked = (inputs == arrays["mask_id"]).nonzero()[0]
        # Masks of the first block that has some: those before are clean.
        stop = len(inputs) if full else masked[0] // block * block + block
        first, masked = stop - block, masked[masked < stop]
        ids = inputs[:stop].copy()
        ids[masked] = masked * 7 % 500
        places = torch.from_numpy(masked - (0 if full else first))

        def draw(tokens: Tensor, scored: Tensor, mask_id: int, _: object) -> MaskedTokens:
            return MaskedTokens.of(tokens, scored, places, mask_id)  # noqa: B023

        fixed(monkeypatch, MaskedTokens, draw)
        text = Passage("golden", tuple(ids.tolist()), given=first)
        [[score]] = LikelihoodEstimator(engine).score([text], ["vanilla"])
        wide = logits[masked].astype(np.float64)
        nats = np.log(np.exp(wide).sum(-1)) - wide[np.arange(len(masked)), ids[masked]]
        assert score.nats[0] == pytest.approx(block / len(masked) * nats.sum(), abs=1e-4, rel=1e-4)


def test_the_noise_bound_is_that_of_recorded_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, signal = golden("diffusion_gemma", "a"), 0.4
    engine = load(folder, dtype="float32", device="cpu")
    for case in json.loads((folder / "cases.json").read_text())["cases"]:
        prompt, canvas = case["prompt"], torch.tensor(case["canvas_1"])
        targets = torch.arange(len(canvas)) * 5 % 60
        engine.generation = engine.generation.replace(block=len(canvas))

        drawn = NoisyTokens(canvas, canvas >= 0, torch.arange(len(canvas)), targets, signal)
        fixed(monkeypatch, NoisyTokens, lambda *_, drawn=drawn: drawn)
        text = Passage("golden", (*prompt, *targets.tolist()), given=len(prompt))
        [[score]] = LikelihoodEstimator(engine).score([text], ["vanilla"])
        expected = 0.0
        for z, target, logits in zip(canvas, targets, case["logits_1"], strict=True):
            chances = np.exp(logits) / np.exp(logits).sum()
            kernel = signal * np.eye(len(chances)) + (1 - signal) / len(chances)  # [target, z]
            ratios = kernel / kernel[:, int(z), None]  # [target, j]
            true, ours = ratios[int(target)], chances @ ratios
            jumps = ours - true + true * np.log(true / ours)  # zero where nothing jumps
            expected += jumps.sum() / len(chances) / signal
        assert score.nats[0] == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_the_noise_bound_of_the_true_posterior_is_the_entropy() -> None:
    """One position, N tokens: integrated over time, data and noise, the bound is tight."""
    data = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    size = len(data)
    nodes, weights = np.polynomial.legendre.leggauss(120)
    bound = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        kernel = (1 - node) * torch.eye(size, dtype=torch.float64) + node / size  # [x, z]
        joint = data[:, None] * kernel
        for z in range(size):
            logits = (joint[:, z] / joint[:, z].sum()).log()[None]
            for x in range(size):
                corruption = NoisyTokens(
                    torch.tensor([z]), torch.tensor([True]), torch.tensor([0]),
                    torch.tensor([x]), 1 - float(node),
                )  # fmt: skip
                bound += weight * float(joint[x, z]) * corruption.nats(logits)
    assert bound == pytest.approx(float(-(data * data.log()).sum()), abs=1e-3)


@pytest.mark.parametrize(("text", "message"), [
    (Passage("a", (5, 6), given=2), "no tokens"),
    (Passage("a", (5, MASK)), "none of a text"),
    (Passage("a", (5,) * 10_000), "the model has"),
])  # fmt: skip
def test_a_passage_without_a_likelihood_is_refused(text: Passage, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        LikelihoodEstimator(tiny_engine("llada2")).score([text], ["vanilla"])
