"""The file that a calibration writes, which serves as a policy (``@file``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from coterie.checkpoints.fingerprint import fingerprint
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import ConfigError, CoterieError, SpecError
from coterie.keys import Key, from_json, names_of, to_json
from coterie.lab.calibration.calibration import Calibration
from coterie.lab.calibration.measurement import PolicyEvaluator, PolicyRun
from coterie.lab.records import make_record
from coterie.loading.load import Model
from coterie.routing import format_policy, parse_policy
from coterie.strict_json import read_object

TITLE = "Calibrated policy"
# Keys of ``GenerationConfig`` that affect routing.
DECODING_FIELDS = ("block", "plan", "unmask", "commit", "prefill", "drift", "skip_settled")


@dataclass(frozen=True)
class ModelIdentity:
    """The properties of a model that a calibration depends on."""

    name: Annotated[str, Key("name")]
    fingerprint: Annotated[str, Key("fingerprint")]
    layers: Annotated[int, Key("layers")]  # MoE layers
    experts: Annotated[int, Key("experts")]
    dtype: Annotated[str, Key("dtype")] = ""
    expert_format: Annotated[str | None, Key("expert_format")] = None  # None: not quantized

    @staticmethod
    def of(model: Model) -> ModelIdentity:
        expert_format = model.spec.expert_format
        return ModelIdentity(
            name=model.name,
            fingerprint="" if model.folder is None else fingerprint(model.folder),
            layers=len(model.spec.moe_layers),
            experts=model.spec.router.experts,
            dtype=str(model.transformer.dtype).removeprefix("torch."),
            expert_format=None if expert_format is None else str(expert_format),
        )


@dataclass(frozen=True)
class CalibratedPolicy:
    """A policy read from a file, and the model and options that it was calibrated for."""

    path: Path
    policy: str
    model: ModelIdentity
    generation: Mapping[str, object]

    def check_model(self, model: Model, generation: GenerationConfig) -> list[str]:
        """Warnings about other weights or other decoding options.

        Raises ConfigError if the model has another number of MoE layers or experts.
        """
        stored, actual = self.model, ModelIdentity.of(model)
        if (stored.layers, stored.experts) != (actual.layers, actual.experts):
            raise ConfigError(
                f"{self.path}: calibrated for {stored.layers} routing layers of {stored.experts} "
                f"experts ({stored.name}), but {model.name} has {actual.layers} of "
                f"{actual.experts}; calibrate again, or give the policy: {self.policy}"
            )
        current = {"skip_settled": None, **generation.document()}
        earlier = {**current, "skip_settled": None, **self.generation}
        changes = [
            f"{key}={earlier[key]} (now {current[key]})"
            for key in DECODING_FIELDS
            if earlier[key] != current[key]
        ]
        differences = []
        if stored.fingerprint != actual.fingerprint:
            differences.append(f"on other weights ({stored.name})")
        if stored.expert_format != actual.expert_format:
            before, now = (each.expert_format or "whole" for each in (stored, actual))
            differences.append(f"with experts {before} (now {now})")
        if changes:
            differences.append(f"with {', '.join(changes)}")
        return [f"{self.path}: calibrated {difference}" for difference in differences]


def read_calibrated_policy(path: Path | str) -> CalibratedPolicy:
    """Read the output of ``coterie calibrate -o``; a CoterieError names the file and the fault."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file; `coterie calibrate -o` writes one")
    content = read_object(path)
    if not isinstance(spec := content.get("policy"), str):
        raise ConfigError(f'{path}: no "policy" in it; `coterie calibrate -o` writes one')
    try:
        policy = format_policy(parse_policy(spec))
    except CoterieError as error:
        raise SpecError(f"{path}: {error}") from None
    model, generation = (
        part if isinstance(part := content.get(key), dict) else {}
        for key in ("model", "generation")
    )
    known = {key: model[key] for key in names_of(ModelIdentity) if key in model}
    required = {"name": str, "fingerprint": str, "layers": int, "experts": int}
    if not all(isinstance(known.get(key), kind) for key, kind in required.items()):
        raise ConfigError(
            f'{path}: no "model" with name, fingerprint, layers and experts in it; '
            f"give the policy itself: {policy}"
        )
    return CalibratedPolicy(path, policy, from_json(ModelIdentity, known), generation)


def calibration_record(
    evaluator: PolicyEvaluator, calibration: Calibration, command: Sequence[str]
) -> dict[str, object]:
    """The calibration as JSON values: the policy, the measurements, the model and the prompts."""
    model, target = evaluator.engine.model, calibration.target
    common = make_record(TITLE, command, [], device=str(model.transformer.device))
    del common["measures"], common["facts"]
    neighbor = calibration.neighbor
    return {
        "policy": calibration.policy,
        "family": calibration.family,
        "target": {
            "kind": target.kind,
            "value": target.value,
            "sure": target.confident,
            "measured": target.spec.measured_on,
        },
        "achieved": to_json(calibration.achieved),
        "beyond": None if neighbor is None else neighbor.to_dict(),
        "ordered": calibration.is_monotonic,
        "decoding": {
            "vanilla": _run_dict(calibration.vanilla),
            "found": _run_dict(calibration.run),
        },
        **evaluation_conditions(evaluator),
        "search": [step.to_dict() for step in calibration.steps],
        "frontier": to_json(calibration.frontier_points),
        **common,
    }


def evaluation_conditions(evaluator: PolicyEvaluator) -> dict[str, object]:
    """What every measurement of the evaluator depends on, by the keys of the record."""
    model = evaluator.engine.model
    return {
        "model": to_json(ModelIdentity.of(model)),
        "prompts": evaluator.prompt_set.to_dict(),
        "generation": {**evaluator.engine.generation.document(), **evaluator.options},
        "rows": evaluator.batch_size,
        "memory": None if (memory := model.memory_config) is None else memory.to_dict(),
    }


def _run_dict(run: PolicyRun) -> dict[str, object]:
    experts = run.experts_estimate()
    return {
        "experts": experts.value,
        "experts_interval": list(experts.interval),
        "right": sum(run.correct) if run.correct else None,
        "n": experts.n,
        "vote_mass_kept": run.vote_mass_kept,
        "forwards_per_block": run.forwards_per_block,
    }
