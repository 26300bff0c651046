"""The file that a calibration leaves, and that ``--policy @file`` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.checkpoints.fingerprint import fingerprint
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CoterieError
from coterie.lab.calibration.calibration import TRACE_KINDS, Calibration, MeasuredPolicy
from coterie.lab.calibration.measurement import PolicyEvaluator, PolicyRun
from coterie.lab.calibration.target import Estimate
from coterie.lab.records import make_record, write_json
from coterie.loading.load import Model
from coterie.routing import format_policy, parse_policy

TITLE = "Calibrated policy"
MODEL_SIZES = ("layers", "experts")  # of a model, which a policy's budgets are made for
DECODING_FIELDS = ("block", "plan", "unmask", "commit", "prefill", "drift")
"""Of a generation: what routing feels."""


@dataclass(frozen=True)
class CalibratedPolicy:
    """A policy read from such a file, and what it was found for."""

    path: Path
    policy: str
    model_name: str  # the model's
    fingerprint: str
    layers: int  # those that route
    experts: int
    generation: Mapping[str, object] = field(default_factory=dict)
    expert_format: str | None = None  # of the experts, where they were quantised

    def check_model(self, model: Model, generation: GenerationConfig) -> list[str]:
        """Remarks on other weights of the same sizes, and on another way of decoding.

        Raises CoterieError where ``model`` has another number of layers or experts: a share of 64
        experts says nothing about 256.
        """
        actual = model_identity(model)
        if (self.layers, self.experts) != (actual["layers"], actual["experts"]):
            raise CoterieError(
                f"{self.path}: calibrated for {self.layers} routing layers of {self.experts} "
                f"experts ({self.model_name}), but {model.name} has {actual['layers']} of "
                f"{actual['experts']}; calibrate again, or give the policy: {self.policy}"
            )
        warnings = []
        if self.fingerprint != actual["fingerprint"]:
            warnings.append(f"{self.path}: calibrated on other weights ({self.model_name})")
        if self.expert_format != actual["expert_format"]:
            stored, current_format = (
                self.expert_format or "whole",
                actual["expert_format"] or "whole",
            )
            warnings.append(f"{self.path}: calibrated with experts {stored} (now {current_format})")
        current = generation.document()
        differences = {
            key: stored
            for key in DECODING_FIELDS
            if (stored := self.generation.get(key, current[key])) != current[key]
        }
        if differences:
            changes = ", ".join(
                f"{key}={stored} (now {current[key]})" for key, stored in differences.items()
            )
            warnings.append(f"{self.path}: calibrated with {changes}")
        return warnings


def read_calibrated_policy(path: Path | str) -> CalibratedPolicy:
    """What ``coterie calibrate -o`` wrote; a CoterieError names the file and its fault."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CoterieError(f"{path}: no such file; `coterie calibrate -o` writes one") from None
    except OSError as error:
        raise CoterieError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CoterieError(
            f"{path}: not JSON ({error}); `coterie calibrate -o` writes it"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("policy"), str):
        raise CoterieError(f'{path}: no "policy" in it; `coterie calibrate -o` writes one')
    try:
        policy = format_policy(parse_policy(content["policy"]))
    except CoterieError as error:
        raise CoterieError(f"{path}: {error}") from None
    return _make_calibrated_policy(path, policy, content)


def calibration_record(
    evaluator: PolicyEvaluator, calibration: Calibration, command: Sequence[str]
) -> dict[str, object]:
    """The calibration as JSON values: what was found, the proof, the way there, what it ran on."""
    model = evaluator.engine.model
    common = make_record(TITLE, command, [], device=str(model.transformer.device))
    del common["measures"], common["facts"]
    return {
        "policy": calibration.policy,
        "family": calibration.family,
        "target": {
            "kind": calibration.target.kind,
            "value": calibration.target.value,
            "sure": calibration.target.confident,
            "measured": measured_on(calibration),
        },
        "achieved": _estimate_dict(calibration.achieved),
        "beyond": None
        if calibration.neighbor is None
        else _measured_policy_dict(calibration.neighbor),
        "ordered": calibration.is_monotonic,
        "decoding": {name: _run_dict(run) for name, run in _runs_by_name(calibration).items()},
        "model": model_identity(model),
        "prompts": evaluator.prompt_set.to_dict(),
        "generation": {**evaluator.engine.generation.document(), **evaluator.options},
        "rows": evaluator.batch_size,
        "memory": None if (memory := model.memory_config) is None else memory.to_dict(),
        "search": [_measured_policy_dict(step) for step in calibration.steps],
        "frontier": [
            {
                "policy": p.policy,
                "experts": _estimate_dict(p.experts),
                "loss": _estimate_dict(p.loss),
            }
            for p in calibration.frontier_points
        ],
        **common,
    }


def write_calibrated_policy(path: Path, content: Mapping[str, object]) -> None:
    """Writes a ``document``, whole or not at all."""
    write_json(path, content)


def model_identity(model: Model) -> dict[str, object]:
    """Which model a policy was found for."""
    return {
        "name": model.name,
        "fingerprint": "" if model.folder is None else fingerprint(model.folder),
        "layers": len(model.spec.moe_layers),
        "experts": model.spec.router.experts,
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "expert_format": None
        if (expert_format := model.spec.expert_format) is None
        else str(expert_format),
    }


def measured_on(calibration: Calibration) -> str:
    """On what the target's readings were taken."""
    if calibration.target.kind in TRACE_KINDS:
        return "the inputs of vanilla's decoding forwards"
    return "decoding to the end under each policy"


def _make_calibrated_policy(
    path: Path, policy: str, content: Mapping[str, object]
) -> CalibratedPolicy:
    model, generation = content.get("model"), content.get("generation")
    fields = model if isinstance(model, dict) else {}
    name, digest = (fields.get(key) for key in ("name", "fingerprint"))
    layers, experts = (fields.get(key) for key in MODEL_SIZES)
    if not (isinstance(name, str) and isinstance(digest, str)) or not (
        isinstance(layers, int) and isinstance(experts, int)
    ):
        raise CoterieError(
            f'{path}: no "model" with name, fingerprint, layers and experts in it; '
            f"give the policy itself: {policy}"
        )
    generation_fields = generation if isinstance(generation, dict) else {}
    expert_format = fields.get("expert_format")
    expert_format = expert_format if isinstance(expert_format, str) else None
    return CalibratedPolicy(
        path, policy, name, digest, layers, experts, generation_fields, expert_format
    )


def _estimate_dict(estimate: Estimate) -> dict[str, object]:
    return {
        "value": estimate.value,
        "interval": list(estimate.interval),
        "n": estimate.n,
        "experts": estimate.experts,
    }


def _measured_policy_dict(measured: MeasuredPolicy) -> dict[str, object]:
    return {"policy": measured.policy, **_estimate_dict(measured.estimate)}


def _runs_by_name(calibration: Calibration) -> dict[str, PolicyRun]:
    return {"vanilla": calibration.vanilla, "found": calibration.run}


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
