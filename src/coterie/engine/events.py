"""Events that an engine emits, and the result of a request."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.decoding import Token
from coterie.decoding.kv_schemes import PassKind
from coterie.offload.traffic import Traffic


@dataclass(frozen=True)
class Denoised:
    """One denoising forward of one request. Positions count from its first new token.

    ``text`` is the part of the answer that has become final: joined, these parts are the answer.
    ``committed`` and ``edited`` tokens are part of the answer, but later edits may change them.
    ``remasked`` positions hold a mask again: an edit dropped or inserted a position before them.
    Applied to a row of masks, all three give the canvas after this forward.
    ``provisional`` tokens are the model's current guess at positions that are still masked.
    ``experts`` is the number of unique experts in each MoE layer, and ``vanilla_experts`` that of
    the unmodified model on the same scores. Both are empty, and the votes are None, unless ``kind``
    is "decode". ``reuse_vote_loss`` is None if no coreset could be reused.
    """

    row: int
    forward: int = 0  # denoising forwards of this request so far, including this one
    kind: PassKind = "decode"
    block: int = 0
    start: int = 0  # of the block; the first block may start inside the prompt, below 0
    stop: int = 0
    text: str = ""
    committed: tuple[Token, ...] = ()
    edited: tuple[Token, ...] = ()
    remasked: tuple[int, ...] = ()
    provisional: tuple[Token, ...] = ()
    experts: tuple[int, ...] = ()
    vanilla_experts: tuple[int, ...] = ()
    vote_mass_kept: float | None = None
    reuse_vote_loss: float | None = None


@dataclass(frozen=True)
class ExpertUsage:
    """Unique experts per layer in a request's decode forwards."""

    total: int  # routed experts of a layer
    forwards: int  # counted forwards: those of kind "decode"
    max: int
    mean: float  # over layers and forwards
    per_layer: tuple[float, ...]  # mean over forwards


@dataclass(frozen=True)
class Result:
    """The result of a request.

    ``forwards`` counts denoising forwards, and ``computed_positions`` what they computed together.
    ``prefills`` and ``commits`` only write keys and values.
    ``cached_tokens`` is how many tokens of the prompt had their keys in the prefix cache.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    new_tokens: int
    forwards: int
    prefills: int
    commits: int
    blocks: int
    seconds: float
    policy: str
    kv_cache: str
    unmask: str
    model: str
    dtype: str
    device: str
    experts: ExpertUsage
    expert_bytes: float  # per layer and forward: mean experts x bytes of one expert
    expert_bytes_vanilla: float  # the same under vanilla routing of the same scores
    vote_mass_kept: float
    # With ``reuse_tolerance``: the share of coresets that were reused after a block's first step,
    # and the mean share of votes that reuse lost.
    coreset_reuse_rate: float | None = None
    reuse_vote_loss: float | None = None
    # Of all requests, while this one was active; None if all experts are resident.
    traffic: Traffic | None = None
    cached_tokens: int = 0
    computed_positions: int = 0
    skip_settled: int | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, object]:
        """The result as JSON, without token ids and traffic.

        Experts and bytes are per layer and decode forward.
        """
        names = ("skip_settled", "computed_positions")
        skipping = {} if self.skip_settled is None else {n: getattr(self, n) for n in names}
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "forwards": self.forwards,
            "prefills": self.prefills,
            "commits": self.commits,
            "blocks": self.blocks,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "policy": self.policy,
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "experts": {
                "total": self.experts.total,
                "max": self.experts.max,
                "mean": self.experts.mean,
                "per_layer": list(self.experts.per_layer),
            },
            "expert_bytes": self.expert_bytes,
            "expert_bytes_vanilla": self.expert_bytes_vanilla,
            "vote_mass_kept": self.vote_mass_kept,
            "coresets_kept": self.coreset_reuse_rate,
            "drift": self.reuse_vote_loss,
            **skipping,
        }


@dataclass(frozen=True)
class Finished:
    """The last event of a request."""

    row: int
    result: Result


Event = Denoised | Finished
