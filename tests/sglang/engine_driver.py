"""Runs SGLang's engine over a job: the script that tests start in SGLang's environment.

A job is a JSON file with the engine's options and steps. Each step writes the text of a policy to
a file, which ``switched_policy`` reads, and generates from prompts.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    engine = import_module("sglang").Engine(**job["engine"])
    steps = []
    for step in job["steps"]:
        Path(job["policy_file"]).write_text(step["policy"], encoding="utf-8")
        results = engine.generate(input_ids=step["prompts"], sampling_params=job["sampling"])
        counts = Path(job["counts_file"])
        lines = counts.read_text(encoding="utf-8").splitlines() if counts.exists() else []
        tokens = [result["output_ids"] for result in results]
        steps.append({"tokens": tokens, "layers": json.loads(lines[-1])["layers"] if lines else []})
    answers = {"steps": steps, "metrics": metrics() if job["engine"]["enable_metrics"] else ""}
    Path(job["answers_file"]).write_text(json.dumps(answers), encoding="utf-8")
    engine.shutdown()


def metrics() -> str:
    """The text that SGLang's server returns under /metrics."""
    prometheus = import_module("prometheus_client")
    registry = prometheus.CollectorRegistry()
    import_module("prometheus_client.multiprocess").MultiProcessCollector(registry)
    return prometheus.generate_latest(registry).decode()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
