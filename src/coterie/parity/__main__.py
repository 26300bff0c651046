"""Parity with reference folders, printed: every maximum error, every generation's verdict."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from coterie.naming import CoterieError
from coterie.parity.forward import Deviation, forward_deviations
from coterie.parity.generation import Verdict, generation_verdicts


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when every folder agrees, 1 when one does not or is damaged, 2 for usage."""
    if not arguments or any(word.startswith("-") for word in arguments):
        print("usage: scripts/parity SET [SET ...]   (folders with reference.npz)", file=sys.stderr)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    good = [_compare(Path(folder)) for folder in arguments]
    if len(good) > 1:
        print(f"{sum(good)} of {len(good)} sets agree")
    return 0 if all(good) else 1


def _compare(folder: Path) -> bool:
    """Print one folder's comparison; whether it agrees."""
    print(f"{folder}", flush=True)
    agrees = True
    try:
        for passed, line in _lines(folder):
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


def _lines(folder: Path) -> Iterator[tuple[bool, str]]:
    for deviation in forward_deviations(folder):
        yield deviation.within, _forward_line(deviation)
    for verdict in generation_verdicts(folder):
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
