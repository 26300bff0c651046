"""Decoding of one request: forward passes, proposals and unmasking, independent of the model."""

from coterie.decoding.kv_schemes import KVScheme, parse_kv_scheme
from coterie.decoding.refinements import UnmaskStrategy, parse_unmask
from coterie.decoding.sampling import Sampling
from coterie.decoding.sequence import BlockUpdate, DecodeRequest, SequenceState, Token

__all__ = [
    "BlockUpdate",
    "DecodeRequest",
    "KVScheme",
    "Sampling",
    "SequenceState",
    "Token",
    "UnmaskStrategy",
    "parse_kv_scheme",
    "parse_unmask",
]
