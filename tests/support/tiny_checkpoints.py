"""Tiny checkpoints on disk: each is made once a process, and copied for every test that asks."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch

from coterie.checkpoints.conversion import ConversionTarget, convert
from coterie.testing import write_checkpoint

ORIGINALS = TemporaryDirectory(prefix="coterie-checkpoints-")
Options = tuple[tuple[str, object], ...]


def tiny_checkpoint(folder: Path, family: str = "llada2", **options: object) -> Path:
    """``folder`` with a tiny checkpoint of 16 experts per layer, in bf16."""
    return _copied(_original(family, _sorted(options)), folder)


def converted_checkpoint(
    folder: Path,
    family: str = "llada2",
    kind: str = "int8",
    *,
    layout: str = "panels",
    **options: object,
) -> Path:
    """``folder`` with the conversion of ``tiny_checkpoint``."""
    return _copied(_converted(family, _sorted(options), kind, layout), folder)


def packed_checkpoint(
    folder: Path, family: str = "llada2", kind: str = "int8", **options: object
) -> Path:
    """``folder/packed``, converted from ``folder/whole``."""
    tiny_checkpoint(folder / "whole", family, **options)
    return converted_checkpoint(folder / "packed", family, kind, **options)


def _sorted(options: dict[str, object]) -> Options:
    return tuple(sorted(options.items()))


@cache
def _original(family: str, options: Options) -> Path:
    folder = Path(mkdtemp(dir=ORIGINALS.name)) / "whole"
    return write_checkpoint(folder, family, **{"dtype": torch.bfloat16, **dict(options)})


@cache
def _converted(family: str, options: Options, kind: str, layout: str) -> Path:
    whole = _original(family, options)
    folder = Path(mkdtemp(dir=ORIGINALS.name)) / "converted"
    convert(whole, folder, ConversionTarget.parse(kind, layout=layout))
    return folder


def _copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, dirs_exist_ok=True))
