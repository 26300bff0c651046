"""Tile sizes of the expert products: measured ones, and defaults that need no measurement.

Measured configurations are stored by device and shape in ``tuning.json`` in ``$COTERIE_CACHE``
(default ``~/.cache/coterie``). The package may ship a ``tuning.json`` next to this module. Without
an entry in either file, the shape decides.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import triton

from coterie.keys import Key, from_json, to_json
from coterie.ops.triton.launch import next_power_of_two
from coterie.strict_json import read_object

MAX_SHARED_BYTES = 220 << 10
"""Bytes of shared memory per program: a little less than Hopper has."""


BUNDLED_CONFIGS = Path(__file__).with_name("tuning.json")


@dataclass(frozen=True)
class GemmShape:
    """One of the two products of a layer: ``rows`` output columns, sums over ``k``."""

    name: str  # "gate-up" (two weight rows per column) or "down"
    tokens: int
    rows: int
    k: int
    dtype: str  # of the tokens
    weight_format: str  # "" for the tokens' dtype, "int8" or "int4"
    group: int  # columns that share a scale; 1 if not quantised

    @property
    def max_tile_tokens(self) -> int:
        """Tokens of a tile: 16, 32 or 64, the smallest that holds all tokens if one does."""
        return 16 if self.tokens <= 16 else 32 if self.tokens <= 32 else 64

    def key(self) -> str:
        """The key of a measured configuration."""
        shape = (
            self.name,
            self.max_tile_tokens,
            self.rows,
            self.k,
            self.dtype,
            self.weight_format,
            self.group,
        )
        return " ".join((device_name(), f"triton {triton.__version__}", *map(str, shape)))


@dataclass(frozen=True)
class TileConfig:
    """A tile: tokens, output columns and elements along k that a program computes at a time."""

    tokens: Annotated[int, Key("tokens")]
    columns: Annotated[int, Key("columns")]
    step: Annotated[int, Key("step")]
    warps: Annotated[int, Key("warps")]
    stages: Annotated[int, Key("stages")]
    transposed: Annotated[bool, Key("turned")] = False  # weight rows are the M dimension

    def launch_options(self) -> dict[str, int]:
        """The kernel constants and launch options."""
        return {
            "TOKENS": self.tokens,
            "COLUMNS": self.columns,
            "STEP": self.step,
            "TRANSPOSED": self.transposed,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def best_config(gemm: GemmShape) -> TileConfig:
    """The measured configuration if there is one, else the default."""
    return _tuned_configs().get(gemm.key()) or default_config(gemm)


def default_config(gemm: GemmShape) -> TileConfig:
    """The configuration for a shape, the same on every machine.

    About 64 weight rows per program: 25 experts then occupy 132 multiprocessors, and the tokens,
    which every program reads again, are small compared with the weights. 24 to 48 KB are in flight
    per program.
    """
    rows = 64 if gemm.name == "down" else 32
    config = TileConfig(gemm.max_tile_tokens, rows, step=64, warps=4, stages=4)
    if gemm.dtype == "float32":
        config = replace(config, columns=rows // 2, step=32, stages=3)
    elif gemm.weight_format:
        config = replace(config, step=128)
    return _clamp_to_shape(config, gemm)


def candidate_configs(gemm: GemmShape) -> Iterator[TileConfig]:
    """Configurations worth measuring, the default first."""
    default = default_config(gemm)
    yielded = {default}
    yield default
    row_factor = 2 if gemm.name == "gate-up" else 1
    shapes = CANDIDATE_SHAPES["quantised" if gemm.weight_format else "bf16"]
    for tokens in sorted({16, gemm.max_tile_tokens}):
        for rows, step, warps, stages in shapes:
            for transposed in (False, True):
                config = TileConfig(tokens, rows // row_factor, step, warps, stages, transposed)
                config = _clamp_to_shape(config, gemm)
                if (transposed and (rows < 64 or warps % 4)) or config in yielded:
                    continue
                if (
                    gemm.dtype != "float32"
                    and _shared_memory_bytes(config, gemm) <= MAX_SHARED_BYTES
                ):
                    yielded.add(config)
                    yield config


CANDIDATE_SHAPES = {
    "bf16": (
        *((64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3)),
        *((32, 128, 4, 4), (32, 128, 2, 4), (32, 256, 4, 3)),
        *((128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)),
    ),
    "quantised": (
        *((64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 8, 4), (64, 256, 8, 3)),
        *((32, 128, 4, 4), (32, 256, 4, 4), (128, 128, 8, 4)),
    ),
}
"""(weight rows, elements along k, warps, stages) to measure, by kind of weights."""


def tune(gemm: GemmShape, measure: Callable[[TileConfig], float]) -> dict[TileConfig, float]:
    """Measures the candidates with ``measure`` (time in any unit) and saves the fastest.

    Returns the times; candidates that raise an error are skipped. Synchronises with the device, so
    it must not run during CUDA graph capture.
    """
    timings: dict[TileConfig, float] = {}
    for config in candidate_configs(gemm):
        try:
            timings[config] = measure(config)
        except (RuntimeError, triton.TritonError):  # too many registers, too much memory
            continue
    if timings:
        save_config(gemm, min(timings, key=timings.__getitem__))
    return timings


def save_config(gemm: GemmShape, config: TileConfig) -> None:
    """Uses ``config`` for this shape from now on, in this process and in later ones."""
    _tuned_configs()[gemm.key()] = config
    document = {key: to_json(config) for key, config in sorted(_tuned_configs().items())}
    path = cache_path()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logging.getLogger("coterie").warning(
            "Measured tile sizes are not saved: %s (set COTERIE_CACHE to another folder)", error
        )


def cache_path() -> Path:
    """The file of measured configurations."""
    # ``expanduser`` of os.path does not fail for users without a home folder.
    folder = os.environ.get("COTERIE_CACHE") or os.path.expanduser("~/.cache/coterie")
    return Path(folder) / "tuning.json"


@cache
def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"


@cache
def _tuned_configs() -> dict[str, TileConfig]:
    """The configurations of both files by key; unreadable files are ignored."""
    configs: dict[str, TileConfig] = {}
    for path in (BUNDLED_CONFIGS, cache_path()):
        try:
            document: dict[str, Any] = read_object(path)
            configs |= {key: from_json(TileConfig, options) for key, options in document.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return configs


def _clamp_to_shape(config: TileConfig, gemm: GemmShape) -> TileConfig:
    """The configuration with tiles no larger than the shape needs, in whole groups of scales."""
    step = max(min(config.step, next_power_of_two(gemm.k)), 32, gemm.group)
    columns = max(min(config.columns, next_power_of_two(gemm.rows)), 16)
    return replace(config, step=step, columns=columns)


def _shared_memory_bytes(config: TileConfig, gemm: GemmShape) -> int:
    """Estimated bytes of shared memory."""
    size = {"int8": 1.0, "int4": 0.5}.get(gemm.weight_format, 2.0)
    rows = config.columns * (2 if gemm.name == "gate-up" else 1)
    return int(config.stages * config.step * (rows * size + config.tokens * 2))
