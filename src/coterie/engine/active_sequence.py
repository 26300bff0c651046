"""One request in the engine, and which requests can share a forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from coterie.decoding import SequenceState
from coterie.decoding.kv_schemes import ForwardPass, PassKind
from coterie.engine.generation_config import GenerationConfig
from coterie.offload.traffic import Traffic
from coterie.routing import Vanilla
from coterie.values import Policy

VANILLA = Vanilla()
INCOMPLETE_CHARACTER = "\ufffd"  # what a tokenizer makes of the first bytes of a character


@dataclass  # not frozen: it counts the passes of its sequence
class ActiveSequence:
    """A submitted request: its decoding state, its KV cache row, its policy and its counters."""

    number: int
    sequence: SequenceState
    cache_row: int
    policy: Policy
    generation: GenerationConfig
    embeddings: Tensor | None = None  # [length, H], the input under a ``smooth`` unmask strategy
    expected: tuple[int, Tensor] | None = None  # block index, expected embeddings [width, H]
    streamed_text: str = ""  # the part of the answer that events carried
    coresets: tuple[int, Tensor] | None = None  # block index, its coresets [L, E] of the last step
    exact_keys: int = 0  # positions from 0 on with keys that follow from their tokens alone
    shared_keys: int = 0  # those of them that came from the prefix cache or were stored in it
    prefills: int = 0
    commits: int = 0
    computed_positions: int = 0  # by denoising forwards
    traffic_before: Traffic | None = None  # of all requests, when this one was submitted
    start_time: float = field(default_factory=time.perf_counter)

    @property
    def next_pass(self) -> ForwardPass:
        """The next forward; raises RuntimeError if the sequence is finished."""
        if self.sequence.next_pass is None:
            raise RuntimeError(f"row {self.number} is finished")
        return self.sequence.next_pass

    def next_text(self, decode: Callable[[Sequence[int]], str]) -> str:
        """The text that has become final since the last call; complete characters only."""
        text = decode(self.sequence.final_tokens)
        if self.sequence.next_pass is not None:
            text = text.rstrip(INCOMPLETE_CHARACTER)
        new_text = text[len(self.streamed_text) :]
        self.streamed_text += new_text
        return new_text

    def next_policy(self) -> Policy:
        """The routing policy of the next forward."""
        kind = self.next_pass.kind
        return self.policy if kind == "decode" else key_policy(kind, self.policy, self.generation)

    def commit_policy(self) -> Policy:
        """The routing policy of the tokens of finished blocks."""
        return key_policy("commit", self.policy, self.generation)

    def reuse_tolerance(self) -> float | None:
        """The share of votes that a reused coreset may lose; None if every forward elects anew."""
        return self.generation.reuse_tolerance if self.next_pass.kind == "decode" else None

    def previous_expected(self) -> Tensor | None:
        """[width, H]: the expected embeddings of the same block's last step; None in its first."""
        block, expected = self.expected or (None, None)
        return expected if block == self.sequence.block.index else None

    def previous_coresets(self) -> Tensor | None:
        """[L, E]: the coresets of the last step in the same block; None in a block's first step."""
        block, coresets = self.coresets or (None, None)
        return coresets if block == self.sequence.block.index else None


def key_policy(kind: PassKind, policy: Policy, config: GenerationConfig) -> Policy:
    """The routing policy of forwards that write keys, for a request that decodes by ``policy``."""
    routing = config.commit_routing if kind == "commit" else config.prefill_routing
    return policy if routing == "policy" else VANILLA


def group_sequences(
    sequences: Iterable[ActiveSequence], *, mix_commits: bool = False
) -> list[list[ActiveSequence]]:
    """Groups that can share a forward, in order of arrival: only positions differ in a group.

    With ``mix_commits`` commits of some rows may share a forward with decodes of others.
    """
    groups: dict[tuple[object, ...], list[ActiveSequence]] = {}
    for active in sequences:
        next_pass, scheme = active.next_pass, active.sequence.request.kv_scheme.base
        has_embeddings = active.embeddings is not None
        mixed = mix_commits and next_pass.kind == "commit" and not scheme.encodes
        kind = "decode" if mixed else next_pass.kind
        key = (
            *(next_pass.width, kind, next_pass.causal_block, next_pass.use_cache),
            *(active.next_policy(), active.reuse_tolerance(), has_embeddings),
            *(next_pass.committed, next_pass.committed and active.commit_policy()),
        )
        groups.setdefault(key, []).append(active)
    return list(groups.values())
