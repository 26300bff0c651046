"""How a product of experts is cut up: plans that are good without measuring, and measured ones.

What was measured on a device is kept in a file (``$COTERIE_CACHE``, else ``~/.cache/coterie``) and
used from then on; so is what lies beside this module as ``plans.json``, measured before. Without
either a plan follows from the shape alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import triton

from coterie.keys import Key, from_json, to_json
from coterie.ops.triton.launch import next_power_of_two

MAX_SHARED_BYTES = 220 << 10
"""Bytes of shared memory that a program may plan to take: what Hopper has, less a little."""


BUNDLED_CONFIGS = Path(__file__).with_name("plans.json")


@dataclass(frozen=True)
class GemmShape:
    """One of the two products: ``rows`` columns of output, sums over ``k``."""

    name: str  # "gate-up", where every column has two rows of weights, or "down"
    tokens: int
    rows: int
    k: int
    dtype: str  # of tokens
    weight_format: str  # "" for weights like tokens, "int8" or "int4"
    group: int

    @property
    def max_tile_tokens(self) -> int:
        """Tokens that a tile must take for one to be enough: 16, 32 or 64 (and then again)."""
        return 16 if self.tokens <= 16 else 32 if self.tokens <= 32 else 64

    def key(self) -> str:
        """By what a measured plan is found again."""
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
    """Tokens, columns of output and numbers along k that a program takes at a time."""

    tokens: Annotated[int, Key("tokens")]
    columns: Annotated[int, Key("columns")]
    step: Annotated[int, Key("step")]
    warps: Annotated[int, Key("warps")]
    stages: Annotated[int, Key("stages")]
    transposed: Annotated[bool, Key("turned")] = (
        False  # rows of weights stand where tensor cores want 64
    )

    def launch_options(self) -> dict[str, int]:
        """As the kernels are launched with it."""
        return {
            "TOKENS": self.tokens,
            "COLUMNS": self.columns,
            "STEP": self.step,
            "TURNED": self.transposed,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def best_config(gemm: GemmShape) -> TileConfig:
    """The measured plan where there is one, else the usual one."""
    return _tuned_configs().get(gemm.key()) or default_config(gemm)


def default_config(gemm: GemmShape) -> TileConfig:
    """A plan that follows from the shape alone: the same on every machine.

    Some 64 rows of weights a program, so that 25 experts keep 132 processors busy and the tokens,
    read anew by every program, are little beside the weights; 24 to 48 KB under way in each.
    """
    rows = 64 if gemm.name == "down" else 32
    config = TileConfig(gemm.max_tile_tokens, rows, step=64, warps=4, stages=4)
    if gemm.dtype == "float32":
        config = replace(config, columns=rows // 2, step=32, stages=3)
    elif gemm.weight_format:
        config = replace(config, step=128)
    return _clamp_to_shape(config, gemm)


def candidate_configs(gemm: GemmShape) -> Iterator[TileConfig]:
    """Plans worth measuring, the usual one first."""
    default = default_config(gemm)
    yielded = {default}
    yield default
    row_factor = 2 if gemm.name == "gate-up" else 1
    for tokens in sorted({16, gemm.max_tile_tokens}):
        for rows, step, warps, stages in CANDIDATE_SHAPES[
            "bf16" if not gemm.weight_format else gemm.weight_format
        ]:
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
    "int8": (
        *((64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 8, 4), (64, 256, 8, 3)),
        *((32, 128, 4, 4), (32, 256, 4, 4), (128, 128, 8, 4)),
    ),
    "int4": (
        *((64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 8, 4), (64, 256, 8, 3)),
        *((32, 128, 4, 4), (32, 256, 4, 4), (128, 128, 8, 4)),
    ),
}
"""Rows of weights, numbers along k, warps and stages that are worth a try."""


def tune(gemm: GemmShape, measure: Callable[[TileConfig], float]) -> dict[TileConfig, float]:
    """Measures the candidates by ``time`` (in any unit; an error means no) and keeps the best.

    Returns what was measured. Not for use while a graph is captured: it waits for the device.
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
    """Use ``plan`` for such work from now on, here and in later runs."""
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
            "Measured plans are not kept for later runs: %s (COTERIE_CACHE names another folder)",
            error,
        )


def cache_path() -> Path:
    """The file of measured plans."""
    folder = os.environ.get("COTERIE_CACHE")
    default_folder = os.path.expanduser("~/.cache/coterie")  # as it is where nobody is at home
    return Path(folder or default_folder) / "plans.json"


@cache
def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"


@cache
def _tuned_configs() -> dict[str, TileConfig]:
    """By key; a file that cannot be read is as good as none."""
    configs: dict[str, TileConfig] = {}
    for path in (BUNDLED_CONFIGS, cache_path()):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            configs |= {key: from_json(TileConfig, options) for key, options in document.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return configs


def _clamp_to_shape(config: TileConfig, gemm: GemmShape) -> TileConfig:
    """The same for small shapes: no tile much larger than what there is; whole groups of scales."""
    step = max(min(config.step, next_power_of_two(gemm.k)), 32, gemm.group)
    columns = max(min(config.columns, next_power_of_two(gemm.rows)), 16)
    return replace(config, step=step, columns=columns)


def _shared_memory_bytes(config: TileConfig, gemm: GemmShape) -> int:
    """About how many bytes of shared memory it takes."""
    size = {"int8": 1.0, "int4": 0.5}.get(gemm.weight_format, 2.0)
    rows = config.columns * (2 if gemm.name == "gate-up" else 1)
    return int(config.stages * config.step * (rows * size + config.tokens * 2))
