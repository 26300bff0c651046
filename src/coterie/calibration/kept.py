"""The file that a calibration leaves, and that ``--policy @file`` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coterie.calibration.bench import Bench, Run
from coterie.calibration.calibration import ON_TRACE, Calibration, Step
from coterie.calibration.target import Reading
from coterie.engine.config import Generation
from coterie.engine.load import Model
from coterie.evals.fingerprint import fingerprint
from coterie.naming import CoterieError
from coterie.results import record, write_json
from coterie.routing import parse_policy, spell

TITLE = "Calibrated policy"
ROUTED = ("layers", "experts")  # of a model, which a policy's budgets are made for
DECODED = ("block", "plan", "unmask", "commit", "prefill", "drift")
"""Of a generation: what routing feels."""


@dataclass(frozen=True)
class Kept:
    """A policy read from such a file, and what it was found for."""

    path: Path
    policy: str
    name: str  # the model's
    fingerprint: str
    layers: int  # those that route
    experts: int
    generation: Mapping[str, object] = field(default_factory=dict)
    form: str | None = None  # of the experts, where they were quantised

    def check(self, model: Model, generation: Generation) -> list[str]:
        """Remarks on other weights of the same sizes, and on another way of decoding.

        Raises CoterieError where ``model`` has another number of layers or experts: a share of 64
        experts says nothing about 256.
        """
        theirs = identity(model)
        if (self.layers, self.experts) != (theirs["layers"], theirs["experts"]):
            raise CoterieError(
                f"{self.path}: calibrated for {self.layers} routing layers of {self.experts} "
                f"experts ({self.name}), but {model.name} has {theirs['layers']} of "
                f"{theirs['experts']}; calibrate again, or give the policy: {self.policy}"
            )
        remarks = []
        if self.fingerprint != theirs["fingerprint"]:
            remarks.append(f"{self.path}: calibrated on other weights ({self.name})")
        if self.form != theirs["expert_format"]:
            was, now_is = self.form or "whole", theirs["expert_format"] or "whole"
            remarks.append(f"{self.path}: calibrated with experts {was} (now {now_is})")
        now = generation.document()
        others = {
            key: was for key in DECODED if (was := self.generation.get(key, now[key])) != now[key]
        }
        if others:
            told = ", ".join(f"{key}={was} (now {now[key]})" for key, was in others.items())
            remarks.append(f"{self.path}: calibrated with {told}")
        return remarks


def read_kept(path: Path | str) -> Kept:
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
        policy = spell(parse_policy(content["policy"]))
    except CoterieError as error:
        raise CoterieError(f"{path}: {error}") from None
    return _with_model(path, policy, content)


def document(bench: Bench, found: Calibration, command: Sequence[str]) -> dict[str, object]:
    """The calibration as JSON values: what was found, the proof, the way there, what it ran on."""
    model = bench.engine.model
    kept = record(TITLE, command, [], device=str(model.transformer.device))
    del kept["measures"], kept["facts"]
    return {
        "policy": found.policy,
        "family": found.family,
        "target": {
            "kind": found.target.kind,
            "value": found.target.value,
            "sure": found.target.sure,
            "measured": measured(found),
        },
        "achieved": _reading(found.achieved),
        "beyond": None if found.beyond is None else _step(found.beyond),
        "ordered": found.ordered,
        "decoding": {name: _run(run) for name, run in _runs(found).items()},
        "model": identity(model),
        "prompts": bench.questions.document(),
        "generation": {**bench.engine.generation.document(), **bench.options},
        "rows": bench.rows,
        "memory": None if model.memory is None else model.memory.asked.document(),
        "search": [_step(step) for step in found.steps],
        "frontier": [
            {"policy": p.policy, "experts": _reading(p.experts), "loss": _reading(p.loss)}
            for p in found.points
        ],
        **kept,
    }


def keep(path: Path, content: Mapping[str, object]) -> None:
    """Writes a ``document``, whole or not at all."""
    write_json(path, content)


def identity(model: Model) -> dict[str, object]:
    """Which model a policy was found for."""
    return {
        "name": model.name,
        "fingerprint": "" if model.folder is None else fingerprint(model.folder),
        "layers": len(model.spec.moe_layers),
        "experts": model.spec.router.experts,
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "expert_format": None if (form := model.spec.expert_format) is None else str(form),
    }


def measured(found: Calibration) -> str:
    """On what the target's readings were taken."""
    if found.target.kind in ON_TRACE:
        return "the inputs of vanilla's decoding forwards"
    return "decoding to the end under each policy"


def _with_model(path: Path, policy: str, content: Mapping[str, object]) -> Kept:
    model, generation = content.get("model"), content.get("generation")
    fields = model if isinstance(model, dict) else {}
    name, digest = (fields.get(key) for key in ("name", "fingerprint"))
    layers, experts = (fields.get(key) for key in ROUTED)
    if not (isinstance(name, str) and isinstance(digest, str)) or not (
        isinstance(layers, int) and isinstance(experts, int)
    ):
        raise CoterieError(
            f'{path}: no "model" with name, fingerprint, layers and experts in it; '
            f"give the policy itself: {policy}"
        )
    decoded = generation if isinstance(generation, dict) else {}
    form = fields.get("expert_format")
    form = form if isinstance(form, str) else None
    return Kept(path, policy, name, digest, layers, experts, decoded, form)


def _reading(reading: Reading) -> dict[str, object]:
    return {
        "value": reading.value,
        "interval": list(reading.interval),
        "n": reading.n,
        "experts": reading.experts,
    }


def _step(step: Step) -> dict[str, object]:
    return {"policy": step.policy, **_reading(step.reading)}


def _runs(found: Calibration) -> dict[str, Run]:
    return {"vanilla": found.vanilla, "found": found.run}


def _run(run: Run) -> dict[str, object]:
    experts = run.experts_reading()
    return {
        "experts": experts.value,
        "experts_interval": list(experts.interval),
        "right": sum(run.right) if run.right else None,
        "n": experts.n,
        "vote_mass_kept": run.vote_mass_kept,
        "forwards_per_block": run.forwards_per_block,
    }
