"""How a row is filled: where to look, what to propose, what to keep. No model is known here."""

from coterie.decoding.plans import DecodePlan, parse_plan
from coterie.decoding.refine import UnmaskStrategy, parse_unmask
from coterie.decoding.row import DecodeRequest, BlockUpdate, SequenceState, Token
from coterie.decoding.sampling import Sampling

__all__ = [
    "DecodeRequest",
    "BlockUpdate",
    "DecodePlan",
    "SequenceState",
    "Sampling",
    "Token",
    "UnmaskStrategy",
    "parse_plan",
    "parse_unmask",
]
