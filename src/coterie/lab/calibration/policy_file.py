"""The file that a calibration writes, which serves as a policy (``@file``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.checkpoints.fingerprint import fingerprint
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import ConfigError, CoterieError, SpecError
from coterie.lab.calibration.calibration import TRACE_KINDS, Calibration
from coterie.lab.calibration.measurement import PolicyEvaluator, PolicyRun
from coterie.lab.records import make_record
from coterie.loading.load import Model
from coterie.routing import format_policy, parse_policy
from coterie.strict_json import read_object

TITLE = "Calibrated policy"
# Keys of ``GenerationConfig`` that affect routing.
DECODING_FIELDS = ("block", "plan", "unmask", "commit", "prefill", "drift")


@dataclass(frozen=True)
class CalibratedPolicy:
    """A policy read from a file, and the model and options that it was calibrated for."""

    path: Path
    policy: str
    model_name: str
    fingerprint: str
    layers: int  # MoE layers
    experts: int
    generation: Mapping[str, object] = field(default_factory=dict)
    expert_format: str | None = None  # None: not quantized

    def check_model(self, model: Model, generation: GenerationConfig) -> list[str]:
        """Warnings about other weights or other decoding options.

        Raises ConfigError if the model has another number of MoE layers or experts.
        """
        actual = model_identity(model)
        if (self.layers, self.experts) != (actual["layers"], actual["experts"]):
            raise ConfigError(
                f"{self.path}: calibrated for {self.layers} routing layers of {self.experts} "
                f"experts ({self.model_name}), but {model.name} has {actual['layers']} of "
                f"{actual['experts']}; calibrate again, or give the policy: {self.policy}"
            )
        current = generation.document()
        changes = [
            f"{key}={stored} (now {current[key]})"
            for key in DECODING_FIELDS
            if (stored := self.generation.get(key, current[key])) != current[key]
        ]
        differences = []
        if self.fingerprint != actual["fingerprint"]:
            differences.append(f"on other weights ({self.model_name})")
        if self.expert_format != actual["expert_format"]:
            before, now = (
                text or "whole" for text in (self.expert_format, actual["expert_format"])
            )
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
    name, digest = model.get("name"), model.get("fingerprint")
    layers, experts = model.get("layers"), model.get("experts")
    expert_format = model.get("expert_format")
    expert_format = expert_format if isinstance(expert_format, str) else None
    if not (isinstance(name, str) and isinstance(digest, str)) or not (
        isinstance(layers, int) and isinstance(experts, int)
    ):
        raise ConfigError(
            f'{path}: no "model" with name, fingerprint, layers and experts in it; '
            f"give the policy itself: {policy}"
        )
    return CalibratedPolicy(path, policy, name, digest, layers, experts, generation, expert_format)


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
            "measured": "the inputs of vanilla's decoding forwards"
            if target.kind in TRACE_KINDS
            else "decoding to the end under each policy",
        },
        "achieved": calibration.achieved.to_dict(),
        "beyond": None if neighbor is None else neighbor.to_dict(),
        "ordered": calibration.is_monotonic,
        "decoding": {
            "vanilla": _run_dict(calibration.vanilla),
            "found": _run_dict(calibration.run),
        },
        **evaluation_conditions(evaluator),
        "search": [step.to_dict() for step in calibration.steps],
        "frontier": [
            {"policy": p.policy, "experts": p.experts.to_dict(), "loss": p.loss.to_dict()}
            for p in calibration.frontier_points
        ],
        **common,
    }


def evaluation_conditions(evaluator: PolicyEvaluator) -> dict[str, object]:
    """What every measurement of the evaluator depends on, by the keys of the record."""
    model = evaluator.engine.model
    return {
        "model": model_identity(model),
        "prompts": evaluator.prompt_set.to_dict(),
        "generation": {**evaluator.engine.generation.document(), **evaluator.options},
        "rows": evaluator.batch_size,
        "memory": None if (memory := model.memory_config) is None else memory.to_dict(),
    }


def model_identity(model: Model) -> dict[str, object]:
    """The properties of a model that a calibration depends on."""
    expert_format = model.spec.expert_format
    return {
        "name": model.name,
        "fingerprint": "" if model.folder is None else fingerprint(model.folder),
        "layers": len(model.spec.moe_layers),
        "experts": model.spec.router.experts,
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "expert_format": None if expert_format is None else str(expert_format),
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
