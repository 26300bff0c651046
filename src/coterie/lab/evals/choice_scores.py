"""Answers to multiple choice: the continuation with the greatest likelihood."""

from __future__ import annotations

import json
import math
import time
from statistics import fmean, variance

from coterie.engine.engine import Engine
from coterie.errors import NonFiniteLogitsError
from coterie.lab.evals.answer_log import Answer
from coterie.lab.evals.generation import EvalRequest
from coterie.lab.evals.tasks.choices import LETTERS, choice_texts, grade_letter
from coterie.lab.likelihood.estimator import LikelihoodEstimator
from coterie.lab.likelihood.passages import continuation_passage
from coterie.model.weights import expert_bytes


def choose(engine: Engine, request: EvalRequest, variant: str, policy: str) -> Answer:
    """The answer to one item, and by nats a byte as another metric ("normalised").

    Its output has the nats of each choice and their standard errors.
    """
    start, model, item = time.perf_counter(), engine.model, request.item
    own = Engine(model, generation=request.generation)
    context = request.task.prompt(item)
    passages = [
        continuation_passage(f"{item.id}/{i}", own, context, text)
        for i, text in enumerate(choice_texts(item))
    ]
    answer = (variant, request.task.name, item.id)
    try:
        [scores] = LikelihoodEstimator(own, request.task.samples).score(passages, [policy])
    except NonFiniteLogitsError as error:
        return Answer(*answer, False, None, {}, error=str(error))
    nats = [score.mean_nats for score in scores]
    by_byte = [value / each.bytes for value, each in zip(nats, passages, strict=True)]
    grade, normalised = (
        grade_letter(LETTERS[values.index(min(values))], item) for values in (nats, by_byte)
    )
    samples = request.task.samples
    noise = [math.sqrt(variance(s.nats) / samples) for s in scores] if samples > 1 else None
    experts = fmean(score.experts for score in scores)
    return Answer(
        *answer, grade.correct, grade.extracted, {"normalised": normalised.correct},
        output=json.dumps({"nats": nats, "noise": noise}),
        finish_reason="stop",
        experts=experts,
        expert_forwards=(forwards := sum(score.forwards for score in scores)),
        forwards=forwards,
        blocks=forwards // samples,
        expert_bytes=experts * expert_bytes(model.spec, model.transformer.dtype),
        vote_mass_kept=fmean(score.vote_mass_kept for score in scores),
        seconds=time.perf_counter() - start,
    )  # fmt: skip
