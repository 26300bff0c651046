"""What an exam found, one line a policy, for a table or a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.evals.exam import Sheet
from coterie.evals.stats import Paired, Share, paired


@dataclass(frozen=True)
class Line:
    """One policy: accuracy whole and by task; the change against the first policy, item by item."""

    sheet: Sheet
    whole: Share
    by_task: dict[str, Share]
    change: Paired | None  # None: this is the first

    def document(self) -> dict[str, object]:
        """As JSON values; experts and bytes are per layer and decoding forward."""
        return {
            "policy": self.sheet.policy,
            "accuracy": _share(self.whole),
            "by_task": {task: _share(share) for task, share in self.by_task.items()},
            "change": None if self.change is None else _change(self.change),
            "experts": self.sheet.experts,
            "expert_bytes": self.sheet.expert_bytes,
            "vote_mass_kept": self.sheet.vote_mass_kept,
            "forwards_per_block": self.sheet.forwards_per_block,
            "new_tokens": self.sheet.new_tokens,
        }


def lines(sheets: Sequence[Sheet], tasks: Sequence[str]) -> list[Line]:
    """The first sheet is the one that the others are compared with."""
    first = sheets[0].right()
    return [
        Line(
            sheet=sheet,
            whole=share(sheet.right()),
            by_task={task: share(sheet.right(task)) for task in tasks},
            change=None if sheet is sheets[0] else paired(first, sheet.right()),
        )
        for sheet in sheets
    ]


def share(right: Sequence[bool]) -> Share:
    """How many are right of how many."""
    return Share(sum(right), len(right))


def _share(share: Share) -> dict[str, object]:
    return {"value": share.value, "n": share.n, "interval": list(share.interval)}


def _change(change: Paired) -> dict[str, object]:
    return {
        "value": change.difference,
        "gained": change.gained,
        "lost": change.lost,
        "interval": list(change.interval),
        "p": change.p,
    }
