"""Prints the comparison with reference folders: the maximum errors, and each generation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from coterie.errors import CoterieError
from coterie.lab.parity.block_rules import block_rule_results, has_block_rules
from coterie.lab.parity.canvas import CASES, canvas_deviations
from coterie.lab.parity.forward import Deviation, forward_deviations
from coterie.lab.parity.generation import ParityResult, generation_results
from coterie.loading.load import choose_device


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 if every folder agrees, 1 if one does not or is damaged."""
    parser = argparse.ArgumentParser(prog="scripts/parity", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="SET", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        device = str(choose_device(options.device))
    except CoterieError as error:
        parser.error(str(error))
    agreeing = [_compare(folder, device) for folder in options.folders]
    if len(agreeing) > 1:
        print(f"{sum(agreeing)} of {len(agreeing)} sets agree")
    return 0 if all(agreeing) else 1


def _compare(folder: Path, device: str) -> bool:
    """Print one folder's comparison. Returns whether it agrees."""
    print(folder, flush=True)
    agrees = True
    try:
        for passed, text in _result_lines(folder, device):
            print(f"  {text}", flush=True)
            agrees = agrees and passed
    except CoterieError as error:
        print(f"  DAMAGED  {error}")
        agrees = False
    # A damaged file may raise any error, which must not stop the other sets.
    except Exception as error:
        print(f"  DAMAGED  {folder}: {type(error).__name__}: {' '.join(str(error).split())}")
        agrees = False
    print(f"  {'agrees' if agrees else 'DOES NOT AGREE'}", flush=True)
    return agrees


def _result_lines(folder: Path, device: str) -> Iterator[tuple[bool, str]]:
    if (folder / CASES).is_file():
        for deviation in canvas_deviations(folder, device):
            yield deviation.within_tolerance, _forward_line(deviation)
        return
    if has_block_rules(folder):
        yield from block_rule_results(folder, device)
        if not (folder / "reference.npz").exists():
            return
    for deviation in forward_deviations(folder, device):
        yield deviation.within_tolerance, _forward_line(deviation)
    for result in generation_results(folder, device):
        yield result.passed, _generation_line(result)


def _forward_line(deviation: Deviation) -> str:
    status = "ok" if deviation.within_tolerance else "FAILED"
    error = f"max error {deviation.max_error:.2e}  (tolerance {deviation.tolerance:.0e})"
    return f"{status:8} {deviation.name:32} {error}"


def _generation_line(result: ParityResult) -> str:
    extra = f" + {result.extra_forwards} that write keys" if result.extra_forwards else ""
    counts = f"{result.forwards} forwards{extra}"
    note = f"  (not judged: {result.excuse})" if result.excuse else ""
    if not result.problems:
        return f"{'ok':8} {result.name:56} ids equal, {counts}{note}"
    status = "reported" if result.excuse else "FAILED"
    return f"{status:8} {result.name:56} {'; '.join(result.problems)}; {counts}{note}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
