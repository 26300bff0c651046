"""Parity with reference folders, printed: every maximum error, every generation's verdict."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from coterie.engine.load import choose_device
from coterie.naming import CoterieError
from coterie.parity.forward import Deviation, forward_deviations
from coterie.parity.generation import Verdict, generation_verdicts

DEVICE = "--device="


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when every folder agrees, 1 when one does not or is damaged, 2 for usage."""
    folders = [word for word in arguments if not word.startswith(DEVICE)]
    devices = [word.removeprefix(DEVICE) for word in arguments if word.startswith(DEVICE)]
    if not folders or any(word.startswith("-") for word in folders):
        print(
            f"usage: scripts/parity [{DEVICE}cuda] SET [SET ...]   (folders with reference.npz)",
            file=sys.stderr,
        )
        return 0 if "--help" in arguments or "-h" in arguments else 2
    try:
        device = str(choose_device(devices[-1] if devices else "cpu"))
    except CoterieError as error:
        print(error, file=sys.stderr)
        return 2
    good = [_compare(Path(folder), device) for folder in folders]
    if len(good) > 1:
        print(f"{sum(good)} of {len(good)} sets agree")
    return 0 if all(good) else 1


def _compare(folder: Path, device: str) -> bool:
    """Print one folder's comparison; whether it agrees."""
    print(f"{folder}", flush=True)
    agrees = True
    try:
        for passed, line in _lines(folder, device):
            print(f"  {line}", flush=True)
            agrees = agrees and passed
    except CoterieError as error:
        print(f"  DAMAGED  {error}")
        agrees = False
    # A damaged file can fail in ways nobody listed; none of them may pass or stop the other sets.
    except Exception as error:
        print(f"  DAMAGED  {folder}: {type(error).__name__}: {' '.join(str(error).split())}")
        agrees = False
    print(f"  {'agrees' if agrees else 'DOES NOT AGREE'}", flush=True)
    return agrees


def _lines(folder: Path, device: str) -> Iterator[tuple[bool, str]]:
    for deviation in forward_deviations(folder, device):
        yield deviation.within, _forward_line(deviation)
    for verdict in generation_verdicts(folder, device):
        yield verdict.passed, _generation_line(verdict)


def _forward_line(found: Deviation) -> str:
    mark = "ok" if found.within else "FAILED"
    return (
        f"{mark:8} {found.name:32} max error {found.worst:.2e}  (tolerance {found.tolerance:.0e})"
    )


def _generation_line(verdict: Verdict) -> str:
    beside = f" + {verdict.unpublished} that write keys" if verdict.unpublished else ""
    told = f"{verdict.forwards} forwards{beside}"
    if not verdict.problems:
        note = f"  (not judged: {verdict.excused})" if verdict.excused else ""
        return f"{'ok':8} {verdict.name:56} ids equal, {told}{note}"
    mark = "reported" if verdict.excused else "FAILED"
    note = f"  (not judged: {verdict.excused})" if verdict.excused else ""
    return f"{mark:8} {verdict.name:56} {'; '.join(verdict.problems)}; {told}{note}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
