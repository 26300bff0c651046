"""Training of the embedded model: from a seed to a checkpoint folder."""

from __future__ import annotations

from dataclasses import asdict, replace

from coterie.errors import ConfigError
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.lab.training import vocabulary
from coterie.lab.training.checkpoint import TrainingRun
from coterie.lab.training.data import Curriculum, DataMixture
from coterie.lab.training.loop import TrainingConfig
from coterie.lab.training.network import NetworkShape

DEFAULT_STEPS = 10_000
# Equations and copying, which are learned slowly.
FIRST_STAGE = DataMixture()
# More whole problems, operators weighted like numbers, and drills with one possible answer.
SECOND_STAGE = DataMixture(
    task_shares=(0.36, 0.18, 0.22, 0.24),
    drill_row_share=0.75,
    copy_share=0.0,
    code_phrase_share=0.6,
    operator_weight=3.0,
    result_masked_share=1.0,
)
# Equations in the wording of problems, with numbers that no problem combines.
THIRD_STAGE = replace(
    SECOND_STAGE,
    task_shares=(0.38, 0.16, 0.2, 0.26),
    drill_row_share=1.0,
    worked_steps_share=0.7,
    code_phrase_share=0.4,
)


def make_config(
    *, steps: int = DEFAULT_STEPS, seed: int = 0, workers: int = 2, save_every: int = 100
) -> TrainingConfig:
    """The training run of the model in the package, or a shorter one of the same form.

    Raises ConfigError if ``workers`` do not divide the rows of a batch evenly.
    """
    if FIRST_STAGE.rows % workers:
        raise ConfigError(f"`workers` must divide {FIRST_STAGE.rows} rows evenly, not {workers}")
    vocabulary_size = vocabulary.build_tokenizer().get_vocab_size()
    return TrainingConfig(
        steps=steps,
        seed=seed,
        workers=workers,
        save_every=save_every,
        shape=replace(NetworkShape(), vocab_size=vocabulary_size),
        decay_fraction=0.5,
        task_names=(*PROBLEM_MAKERS, "drill"),
    )


def curriculum_stages(steps: int) -> dict[int, DataMixture]:
    """The data mixtures by their start step."""
    return {0: FIRST_STAGE, steps // 2: SECOND_STAGE, steps * 3 // 4: THIRD_STAGE}


def embedded_run(config: TrainingConfig) -> TrainingRun:
    """The run that trains the model in the package, in about an hour on two cores."""
    stages, tokenizer = curriculum_stages(config.steps), vocabulary.build_tokenizer()
    return TrainingRun(
        "Embedded training",
        config,
        tokenizer,
        Curriculum(tokenizer, stages, config.seed),
        facts={"lessons": {step: asdict(mixture) for step, mixture in stages.items()}},
    )
