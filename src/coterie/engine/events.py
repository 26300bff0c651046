"""What an engine tells while it works, and what it hands over at the end."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.decoding import Token
from coterie.decoding.kv_schemes import PassKind
from coterie.offload.traffic import Traffic


@dataclass(frozen=True)
class Denoised:
    """One forward of one row. Positions count from the row's first new token.

    ``committed`` and ``edited`` stand in the text from now on (later edits aside); ``provisional``
    is what the model would write at the positions still masked. ``experts``: unique experts of each
    routing layer in this forward, empty where it is no decoding forward (``kind``), and the votes
    kept are None there; so is the share of them lost to ``drift`` where no coreset could stay.
    """

    row: int
    forward: int = 0  # denoising forwards of this row so far, this one included
    kind: PassKind = "decode"
    block: int = 0
    start: int = 0  # of the block; the first may begin before 0, inside the prompt
    stop: int = 0
    committed: tuple[Token, ...] = ()
    edited: tuple[Token, ...] = ()
    provisional: tuple[Token, ...] = ()
    experts: tuple[int, ...] = ()
    vote_mass_kept: float | None = None
    reuse_vote_loss: float | None = None


@dataclass(frozen=True)
class ExpertUsage:
    """Experts that one row used in its decoding forwards; means are over layers and forwards."""

    total: int  # routed experts of a layer
    forwards: int  # those that were counted: re-forwards of a whole row are not
    max: int
    mean: float
    per_layer: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """A finished row. Only ``forwards`` denoise; the passes that write keys are counted apart."""

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
    plan: str
    unmask: str
    model: str
    dtype: str
    device: str
    experts: ExpertUsage
    expert_bytes: float  # read per layer and forward: mean experts x bytes of one
    expert_bytes_vanilla: float  # the same for the unmodified model on the same scores
    vote_mass_kept: float
    coreset_reuse_rate: float | None = None  # with drift: of a block's later steps, the share kept
    reuse_vote_loss: float | None = None  # and the mean share of votes lost by it
    # Of all rows' forwards since this one began; None where all experts are in memory.
    traffic: Traffic | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, object]:
        """As JSON, without the token ids and the traffic; experts and bytes are per layer and
        decoding forward."""
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
        }


@dataclass(frozen=True)
class Finished:
    """A row is done; nothing more is told of it."""

    row: int
    result: Result


Event = Denoised | Finished
