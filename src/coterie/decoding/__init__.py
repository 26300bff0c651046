"""Decoding of one request: forward passes, proposals and unmasking, independent of the model."""

from coterie.decoding.kv_schemes import DecodePlan, parse_plan
from coterie.decoding.refinements import UnmaskStrategy, parse_unmask
from coterie.decoding.sampling import Sampling
from coterie.decoding.sequence import BlockUpdate, DecodeRequest, SequenceState, Token

__all__ = [
    "BlockUpdate",
    "DecodePlan",
    "DecodeRequest",
    "Sampling",
    "SequenceState",
    "Token",
    "UnmaskStrategy",
    "parse_plan",
    "parse_unmask",
]
