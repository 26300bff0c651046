"""The compiled kernels as Python sees them: ``api.hpp`` written down a second time."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from functools import cache

from coterie.errors import CoterieError
from coterie.ops.cpu.build import LIBRARY_PATH
from coterie.ops.packed_layout import LAYOUT_VERSION

ABI_VERSION = 5
FORMAT_IDS: Mapping[str, int] = {"bf16": 0, "int8": 1, "int4": 2}
VOTE_KINDS = ("topk-prob", "weight", "count", "full", "margin", "max")  # by their numbers
ISA_VARIABLE = "COTERIE_ISA"


class ExpertsArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "ids", "slot_of", "weights", "out", "panels")),
        ("stride", c_size_t),
        *((name, c_int32) for name in ("tokens", "k", "experts", "slots", "hidden", "width")),
        *((name, c_int32) for name in ("threads", "format", "x_is_bf16")),
    )


class ReadArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("panels", "slots")),
        *((name, c_size_t) for name in ("stride", "bytes")),
        *((name, c_int32) for name in ("count", "threads")),
    )


class PackArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("gate_up", "down")),
        *((name, c_void_p) for name in ("gate_up_scales", "down_scales", "panels")),
        ("stride", c_size_t),
        *((name, c_int32) for name in ("experts", "hidden", "width", "threads", "format")),
    )


class PackMatrixArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("rows", "panels")),
        *((name, c_int32) for name in ("count", "k", "threads", "format")),
    )


class MatmulArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "panels", "beside", "out")),
        *((name, c_int32) for name in ("tokens", "k", "rows", "format")),
        *((name, c_int32) for name in ("x_is_bf16", "out_is_bf16")),
    )


class RouteArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "p", "bias", "voice", "resident")),
        *((name, c_void_p) for name in ("ids", "own", "weights", "used", "ballots", "sums")),
        *((name, c_void_p) for name in ("before", "say", "coresets", "stayed", "lost")),
        *((name, c_double) for name in ("mass", "lam", "eps", "drift")),
        *((name, c_float) for name in ("scale", "epsilon")),
        *((name, c_int32) for name in ("stride", "sequences", "tokens", "experts", "k")),
        *((name, c_int32) for name in ("groups", "kept", "renormalise", "biased")),
        *((name, c_int32) for name in ("vote", "first", "count", "least", "protect", "most")),
    )


class AttentionArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "query_norm", "key_norm", "cos", "sin")),
        *((name, c_void_p) for name in ("positions", "places", "limits", "keys", "values", "out")),
        *((name, c_size_t) for name in ("row_stride", "head_stride")),
        *((name, c_float) for name in ("epsilon", "scale")),
        *((name, c_int32) for name in ("rows", "width", "heads", "kv_heads", "dim", "half")),
        ("reach", c_int32),
    )


class RmsNormArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "more", "weight", "sum", "out")),
        ("epsilon", c_float),
        *((name, c_int32) for name in ("rows", "width")),
    )


class SiluMulArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("both", "out")),
        *((name, c_int32) for name in ("rows", "width")),
    )


class Op(Structure):
    """See ``api.hpp``."""

    _fields_ = (("work", c_void_p), ("kind", c_int32))


class OpList(Structure):
    """See ``api.hpp``."""

    _fields_ = (("links", c_void_p), ("count", c_int32), ("threads", c_int32))


class LogitsSummaryArgs(Structure):
    """See ``api.hpp``."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "best", "unmasked", "total")),
        *((name, c_int32) for name in ("rows", "width", "mask", "threads")),
    )


@dataclass(frozen=True)
class KernelLibrary:
    """The loaded library, and which of its instruction sets run here: name -> its number."""

    handle: ctypes.CDLL
    isas: Mapping[str, int]

    def isa(self) -> int:
        """The best one, or what COTERIE_ISA asks for."""
        isa_name = os.environ.get(ISA_VARIABLE)
        if not isa_name:
            return max(self.isas.values())
        if isa_name not in self.isas:
            raise CoterieError(
                f"{ISA_VARIABLE}={isa_name}: no such instruction set here; known: {', '.join(self.isas)}"
            )
        return self.isas[isa_name]

    def is_widest_isa(self) -> bool:
        """Whether that one has the widest registers."""
        return self.isa() >= self.isas.get("avx512", len(self.isas))


@cache
def load_library() -> KernelLibrary | None:
    """The kernels, or None where they were not built; why is said once."""
    try:
        handle = ctypes.CDLL(str(LIBRARY_PATH))
        handle.coterie_abi_version.argtypes = handle.coterie_layout_version.argtypes = ()
        versions = handle.coterie_abi_version(), handle.coterie_layout_version()
    except (OSError, AttributeError) as error:
        if LIBRARY_PATH.exists():
            return _warn_unavailable(f"they do not load here ({error})")
        return _warn_unavailable("no compiler was found when it was installed")
    if versions != (ABI_VERSION, LAYOUT_VERSION):
        return _warn_unavailable("they were built for another version; install it again")
    handle.coterie_isa_name.argtypes = (c_int32,)
    handle.coterie_isa_name.restype = c_char_p
    handle.coterie_isa_supported.argtypes = (c_int32,)
    handle.coterie_group_size.argtypes = (c_int32,)
    handle.coterie_expert_bytes.argtypes = (c_int32, c_int32, c_int32)
    handle.coterie_expert_bytes.restype = c_size_t
    handle.coterie_pack.argtypes = (POINTER(PackArgs),)
    handle.coterie_pack.restype = None
    handle.coterie_read_experts.argtypes = (POINTER(ReadArgs),)
    handle.coterie_read_experts.restype = c_uint64
    handle.coterie_run_experts.argtypes = (c_int32, POINTER(ExpertsArgs))
    handle.coterie_matrix_bytes.argtypes = (c_int32, c_int32, c_int32)
    handle.coterie_matrix_bytes.restype = c_size_t
    handle.coterie_pack_matrix.argtypes = (POINTER(PackMatrixArgs),)
    handle.coterie_pack_matrix.restype = None
    handle.coterie_run_ops.argtypes = (c_int32, POINTER(OpList))
    handle.coterie_route.argtypes = (c_int32, POINTER(RouteArgs))
    handle.coterie_summarize_logits.argtypes = (c_int32, POINTER(LogitsSummaryArgs))
    handle.coterie_crc32.argtypes = (c_void_p, c_size_t, POINTER(c_uint32))
    return KernelLibrary(handle, _isas(handle))


def _isas(handle: ctypes.CDLL) -> dict[str, int]:
    isas, index = {}, 0
    while (name := handle.coterie_isa_name(index)) is not None:
        if handle.coterie_isa_supported(index):
            isas[name.decode()] = index
        index += 1
    return isas


def _warn_unavailable(reason: str) -> None:
    logging.getLogger("coterie").warning(
        "Coterie runs on PyTorch alone, without its own kernels for CPUs: %s", reason
    )
