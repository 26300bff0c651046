"""The votes of the last forward of each watched request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coterie.loading.load import Model
from coterie.offload.mixed_precision_store import MixedPrecisionStore
from coterie.routing import Election
from coterie.routing.coreset import counted_votes, flatten_batch
from coterie.routing.router import VOTE_UNIT, admitted_experts
from coterie.routing.votes import vote_weights
from coterie.telemetry import Recorder, RowId
from coterie.values import ExpertStore, Policy, Routing, Scores, expert_mask


@dataclass(frozen=True)
class StepVotes:
    """The election of one request in one forward, on the host: L MoE layers, E experts.

    ``elected`` are the experts that the step reads. ``high`` are those in high precision when
    their layer starts; None if all experts have one precision.
    """

    layers: tuple[int, ...]
    votes: Tensor  # [L, E] fp64, in votes: a token has one at most for each expert
    elected: Tensor  # [L, E] bool
    resident: Tensor | None  # [L, E] bool: in fast memory before the step; None: all are
    high: Tensor | None  # [L, E] bool


@dataclass(frozen=True)
class _LayerVotes:
    """One layer of one forward of S rows, on the model's device."""

    votes: Tensor  # [S, E] int64 in VOTE_UNIT
    elected: Tensor  # [S, E] bool
    resident: Tensor | None  # [E] bool
    high: Tensor | None  # [E] bool


@dataclass  # not frozen: it keeps the last forward of each watched row
class VoteRecorder(Recorder):
    """Keeps the votes of watched rows. Recording never waits for the device; ``latest`` does.

    Policies that elect no coreset are shown by the votes of ``des-vote``.
    """

    store: ExpertStore | None = None
    _elections: dict[RowId, Election] = field(default_factory=dict)
    _latest: dict[RowId, tuple[int, dict[int, _LayerVotes]]] = field(default_factory=dict)
    _forward: dict[int, _LayerVotes] = field(default_factory=dict)
    _election: Election | None = None  # of the current forward; None: no row of it is watched

    @staticmethod
    def of(model: Model) -> VoteRecorder:
        """A recorder that also shows what this model's store has in fast memory."""
        return VoteRecorder(model.store)

    @property
    def is_idle(self) -> bool:
        """Whether no row is watched."""
        return not self._elections

    def watch(self, row: RowId, policy: Policy) -> None:
        """Keep the votes of this row from its next forward on."""
        self._elections[row] = getattr(policy, "election", None) or Election()

    def unwatch(self, row: RowId) -> None:
        """Drop a row, watched or not."""
        self._elections.pop(row, None)
        self._latest.pop(row, None)

    def latest(self, row: RowId) -> StepVotes | None:
        """The votes of the row's last decode forward; None if there was none."""
        index, layers = self._latest.get(row, (0, {}))
        if not layers:
            return None
        ordered = sorted(layers)
        of_row = [layers[layer] for layer in ordered]
        votes = torch.stack([layer.votes[index] for layer in of_row]).cpu()
        return StepVotes(
            layers=tuple(ordered),
            votes=votes.double() / VOTE_UNIT,
            elected=torch.stack([layer.elected[index] for layer in of_row]).cpu(),
            resident=_stacked([layer.resident for layer in of_row]),
            high=_stacked([layer.high for layer in of_row]),
        )

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        watched = {row: index for index, row in enumerate(rows) if row in self._elections}
        self._forward = {}
        self._latest |= {row: (index, self._forward) for row, index in watched.items()}
        # Rows of one forward share a policy.
        self._election = next((self._elections[row] for row in watched), None)

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        if self._election is None:
            return
        rows, _, experts = scores.logits.shape
        resident, high = scores.resident, self._high_precision(layer)
        self._forward[layer] = _LayerVotes(
            votes=election_votes(scores, routing, self._election).expand(rows, experts),
            elected=expert_mask(routing.topk_ids.view(rows, -1), experts),
            # A store on a CPU may change its mask in place.
            resident=None if resident is None else resident.clone(),
            high=None if high is None else high.clone(),
        )

    def _high_precision(self, layer: int) -> Tensor | None:
        if not isinstance(self.store, MixedPrecisionStore):
            return None
        return self.store.high.resident(layer)


def election_votes(scores: Scores, routing: Routing, election: Election) -> Tensor:
    """[S, E] int64 in ``VOTE_UNIT``: the votes that a plain election counts; [1, E] for a batch."""
    vanilla_ids = routing.vanilla_ids.view(*scores.logits.shape[:2], -1)
    scores = replace(scores, vanilla_ids=vanilla_ids, admitted=admitted_experts(scores))
    if election.scope == "batch":
        scores = flatten_batch(scores)
    return counted_votes(scores, vote_weights(scores, election.voters), election)


def _stacked(masks: list[Tensor | None]) -> Tensor | None:
    """[L, E] on the host; None if a layer has none."""
    present = [mask for mask in masks if mask is not None]
    return torch.stack(present).cpu() if len(present) == len(masks) else None
