"""Bits a byte and a token of given text under several policies, paired by passage."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from coterie.engine.engine import Engine
from coterie.errors import CoterieError, TaskError
from coterie.files import read_file
from coterie.keys import Key, from_json, to_json
from coterie.lab.evals.run import run_identity
from coterie.lab.evals.stats import ratio_interval
from coterie.lab.evals.tasks.source import MAX_BYTES, decode_text
from coterie.lab.journal import Journal
from coterie.lab.likelihood.estimator import LikelihoodEstimator, Passage, PassageScore
from coterie.lab.likelihood.passages import split_text
from coterie.loading.load import Model
from coterie.model.weights import expert_bytes

NATS_PER_BIT = math.log(2)
ScoreCallback = Callable[[int, int], None]  # finished and all scores


@dataclass(frozen=True)
class BitsEstimate:
    """A mean over text: its 95 % interval over passages, and its standard error over corruptions.

    ``noise`` is the error of the estimator on this text; None with one sample.
    """

    value: Annotated[float, Key("value")]
    interval: Annotated[tuple[float, float], Key("interval")]
    noise: Annotated[float | None, Key("noise")]

    @staticmethod
    def of(nats: Sequence[Sequence[float]], units: Sequence[int]) -> BitsEstimate:
        """From samples of nats of each passage, and its number of bytes or tokens."""
        bits, total = np.asarray(nats, dtype=float) / NATS_PER_BIT, sum(units)
        means, samples = bits.mean(axis=1), bits.shape[1]
        noise = None
        if samples > 1:
            noise = math.sqrt(bits.var(axis=1, ddof=1).sum() / samples) / total
        interval = ratio_interval(means.tolist(), units)
        return BitsEstimate(float(means.sum()) / total, interval, noise)


@dataclass(frozen=True)
class TextSummary:
    """One policy on all passages; changes are against the first policy, passage by passage."""

    policy: Annotated[str, Key("policy")]
    bits_per_byte: Annotated[BitsEstimate, Key("bits_per_byte")]
    bits_per_token: Annotated[BitsEstimate, Key("bits_per_token")]
    change: Annotated[BitsEstimate | None, Key("change")]  # of bits a byte
    rise: Annotated[float | None, Key("rise")]  # the change as a share of the first policy's bits
    rise_interval: Annotated[tuple[float, float] | None, Key("rise_interval")]
    experts: Annotated[float, Key("experts")]  # mean unique experts of a layer and forward
    expert_bytes: Annotated[float, Key("expert_bytes")]
    vote_mass_kept: Annotated[float, Key("vote_mass_kept")]
    forwards: Annotated[int, Key("forwards")]


@dataclass(frozen=True)
class TextData:
    """The passages of a file or a folder, and the sha256 of their bytes."""

    name: str
    sha256: str
    passages: tuple[Passage, ...]

    def settings(self) -> dict[str, object]:
        """The identity of the data, for records."""
        passages = self.passages
        return {
            "data": self.name,
            "sha256": self.sha256,
            "passages": len(passages),
            "bytes": sum(each.bytes for each in passages),
            "tokens": sum(len(each.ids) - each.given for each in passages),
        }


def read_text_data(path: Path, engine: Engine, limit: int | None = None) -> TextData:
    """The passages of ``read_texts``; raises TaskError for what the tokenizer cannot encode."""
    digest, passages = hashlib.sha256(), list[Passage]()
    for name, text in read_texts(path):
        digest.update(text.encode())
        try:
            passages += split_text(name, text, engine)
        except CoterieError as error:
            raise TaskError(f"{path}: {name}: {error}") from None
    return TextData(path.name, digest.hexdigest(), tuple(passages[:limit]))


def read_texts(path: Path) -> list[tuple[str, str]]:
    """Name and text of a file, or of a folder's files that are not hidden, in order of names.

    Raises TaskError for a file that is not UTF-8, and if there is no text.
    """
    files = {path.name: path}
    if path.is_dir():
        names = {str(each.relative_to(path)): each for each in sorted(path.rglob("*"))}
        hidden = {name for name in names if any(part[0] == "." for part in Path(name).parts)}
        files = {n: file for n, file in names.items() if file.is_file() and n not in hidden}
    texts = [
        (name, decode_text(read_file(file, MAX_BYTES), str(file), "text"))
        for name, file in files.items()
    ]
    if not any(text for _, text in texts):
        raise TaskError(f"{path}: holds no text")
    return texts


def score_text(
    estimator: LikelihoodEstimator,
    passages: Sequence[Passage],
    policies: Sequence[str],
    journal: Journal,
    *,
    batch_size: int,
    on_score: ScoreCallback = lambda done, total: None,
) -> list[list[PassageScore]]:
    """The scores of each policy; those that are in the journal are not measured again.

    Passages share forwards in fixed groups, so that a resumed run has the scores of a whole one.
    """
    total, done = len(passages) * len(policies), 0
    scores: list[list[PassageScore]] = [[] for _ in policies]
    for start in range(0, len(passages), batch_size):
        group = passages[start : start + batch_size]
        steps = [f"{policy} {group[0].id} {len(group)}" for policy in policies]
        missing = [i for i, step in enumerate(steps) if step not in journal.steps]
        measured = estimator.score(group, [policies[i] for i in missing]) if missing else []
        for i, values in zip(missing, measured, strict=True):
            journal.add(steps[i], to_json(values))
        for step, values in zip(steps, scores, strict=True):
            values += [_read_score(document) for document in journal.steps[step]]
        done += len(group) * len(policies)
        on_score(done, total)
    return scores


def text_identity(estimator: LikelihoodEstimator, data: TextData) -> dict[str, object]:
    """What every score depends on, besides the policy, as JSON values."""
    generation = estimator.engine.generation.document()
    options = {key: generation[key] for key in ("block", "plan", "commit")}
    return {
        **run_identity(estimator.engine, (), options=options),
        "samples": estimator.samples,
        "seed": estimator.seed,
        "text": data.settings(),
    }


def summarize_text(
    model: Model,
    passages: Sequence[Passage],
    policies: Sequence[str],
    scores: Sequence[Sequence[PassageScore]],
) -> list[TextSummary]:
    """One summary a policy; each is compared with the first."""
    sizes = [each.bytes for each in passages]
    tokens = [len(each.ids) - each.given for each in passages]
    expert_size = expert_bytes(model.spec, model.transformer.dtype)
    first, summaries = scores[0], []
    for policy, own in zip(policies, scores, strict=True):
        nats, changes = [score.nats for score in own], paired_nats(first, own)
        forwards = [score.forwards for score in own]
        is_first = own is first
        rise, interval = relative_rise(first, own)
        summaries.append(
            TextSummary(
                policy=policy,
                bits_per_byte=BitsEstimate.of(nats, sizes),
                bits_per_token=BitsEstimate.of(nats, tokens),
                change=None if is_first else BitsEstimate.of(changes, sizes),
                rise=None if is_first else rise,
                rise_interval=None if is_first else interval,
                experts=(experts := _weighted([score.experts for score in own], forwards)),
                expert_bytes=experts * expert_size,
                vote_mass_kept=_weighted([score.vote_mass_kept for score in own], forwards),
                forwards=sum(forwards),
            )
        )
    return summaries


def paired_nats(
    first: Sequence[PassageScore], other: Sequence[PassageScore]
) -> list[tuple[float, ...]]:
    """The difference of each sample of each passage: both have the same corruptions."""
    pairs = zip(first, other, strict=True)
    return [tuple(b - a for a, b in zip(x.nats, y.nats, strict=True)) for x, y in pairs]


def relative_rise(
    first: Sequence[PassageScore], other: Sequence[PassageScore]
) -> tuple[float, tuple[float, float]]:
    """By which share the bits rise, and its 95 % interval: a paired bootstrap over passages."""
    before, after = ([score.mean_nats for score in scores] for scores in (first, other))
    low, high = ratio_interval(after, before)
    return sum(after) / (sum(before) or 1.0) - 1, (low - 1, high - 1)


def _read_score(document: Mapping[str, object]) -> PassageScore:
    score = from_json(PassageScore, document)
    return PassageScore(tuple(score.nats), score.experts, score.forwards, score.vote_mass_kept)


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    return float(np.average(values, weights=weights))
