"""A model ready to run, from a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from coterie import ops
from coterie.engine import behind
from coterie.engine.behind import Behind
from coterie.engine.imagining import imagine, imagined_room
from coterie.engine.memory import Memory, Settled, settle
from coterie.engine.mixing import Packed, mixed
from coterie.engine.offloaded import offloaded
from coterie.engine.room import free_memory
from coterie.engine.source import EMBEDDED, find_folder
from coterie.experts.ledger import Reporting
from coterie.experts.mixed import Mixed
from coterie.experts.offload import Offloaded
from coterie.experts.store import Resident
from coterie.families import Config, Family, eos_ids, mask_id, recognise
from coterie.families.names import is_stacked, weight_map
from coterie.model.checkpoint import Checkpoint
from coterie.model.filling import Filling
from coterie.model.spec import ModelSpec
from coterie.model.transformer import Transformer, build
from coterie.model.weights import allocate, bytes_kept, take_slab
from coterie.naming import CoterieError
from coterie.ops import cpu
from coterie.quant import Format, parse_format
from coterie.text import Codec, load_codec
from coterie.values import Store

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
SMALL = 4 << 30
"""Models whose fp32 weights stay below this run in fp32 on a CPU, where it costs little."""


@dataclass(frozen=True)
class Model:
    """What the engine needs to know of a model."""

    name: str
    family: Family
    transformer: Transformer
    codec: Codec
    mask_id: int
    eos_ids: tuple[int, ...]
    folder: Path | None = None  # None: made in memory
    offloaded: Offloaded | None = None  # its experts, where they are not all in memory
    memory: Settled | None = None  # what the memory that was asked for experts came to
    rationed: Reporting | None = None  # the store, where memory is short or imagined to be

    @property
    def spec(self) -> ModelSpec:
        return self.transformer.spec

    def imagining(self, asked: Memory) -> Model:
        """The same in a smaller memory that is imagined; raises CoterieError for none, and for a
        model whose memory is short already."""
        if self.rationed is not None:
            raise CoterieError("a memory can be imagined only where all experts are in memory")
        settled = imagined_room(asked, self.spec, self.transformer.dtype)
        if asked.warm is not None and self.folder is not None:
            asked.warm.check(self.spec, self.folder)
        transformer, store = imagine(self.transformer, settled)
        return replace(self, transformer=transformer, memory=settled, rationed=store)


def load_model(
    name_or_path: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    experts: str | Format | None = None,
    expert_memory: str | Memory | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a folder, a hub id, or (None) the embedded model.

    ``device`` "auto" is CUDA where there is one. ``dtype`` None or "auto" is bf16, but fp32 on a
    CPU for models whose weights then stay below 4 GiB. ``experts`` "int8" or "int4" quantises the
    routed experts as they are read. Packed experts are mapped and stay in their file where kernels
    of a CPU read them, and are unpacked elsewhere. With ``expert_memory`` ("35%", "47" a layer,
    "6GiB", "auto": as many as are free, or a ``Memory``) only so many are in memory, and the others
    are read when they are needed; a policy's votes may then prefer those that are there. Of a
    memory that is only imagined nothing is read: all are there, and book is kept.
    ``progress`` hears (bytes done, bytes in all).
    Every bad input raises a CoterieError of one line.
    """
    folder = find_folder(name_or_path)
    config = Config.of(folder / "config.json")
    family = recognise(config)
    spec = family.read(config)
    where = choose_device(device)
    what = choose_dtype(dtype, spec, where)
    kept = _kept_as(folder, spec, experts, where)
    asked = Memory.parse(expert_memory) if isinstance(expert_memory, str) else expert_memory
    imagined = asked if asked is not None and asked.imagined else None
    if imagined is not None:
        imagined_room(imagined, kept, what)  # fails here, before weights are loaded
    memory = None if imagined else _settled(folder, spec, kept, asked, dtype=what, device=where)
    transformer, store = _load_weights(
        folder, family, spec, kept, dtype=what, device=where, memory=memory, progress=progress
    )
    codec = load_codec(folder, template=family.defaults.template, vocabulary=spec.vocabulary)
    model = Model(
        name=EMBEDDED if name_or_path is None else str(name_or_path),
        family=family,
        transformer=transformer,
        codec=codec,
        mask_id=_agreed_mask(config, codec, mask_id(config, family, spec.vocabulary)),
        eos_ids=tuple(dict.fromkeys(codec.ends + eos_ids(config, family, spec.vocabulary))),
        folder=folder,
        offloaded=store if isinstance(store, Offloaded) else None,
        memory=memory,
        rationed=store if isinstance(store, Offloaded | Mixed) else None,
    )
    return model if imagined is None else model.imagining(imagined)


def _settled(
    folder: Path,
    stored: ModelSpec,
    kept: ModelSpec,
    wanted: Memory | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Settled | None:
    """Raises CoterieError where experts cannot be read one by one, or not even one fits."""
    if wanted is None:
        return None
    if wanted.warm is not None:
        wanted.warm.check(kept, folder)
    if behind.far(device):
        return behind.settle_behind(wanted, stored, kept, dtype, device=device)
    if not kept.panels:
        raise CoterieError(
            f"{folder}: --expert-memory reads experts from a packed checkpoint, for a CPU's "
            "kernels; `coterie quantize MODEL OUT --experts int8` makes one, "
            "and --imagine-memory acts as if"
        )
    if wanted.host is not None:
        raise CoterieError(
            "--host-memory has no effect on a CPU: --expert-memory is memory of the host there; "
            "with --device cuda it stands between the GPU's memory and the disk"
        )
    if wanted.aside is not None:
        raise CoterieError("--cpu-experts has no effect where a CPU computes all experts anyway")
    free, size = free_memory(device), kept.expert_stride
    found = settle(wanted, kept, dtype, expert_bytes=size, free=free)
    if found.whole and wanted.coarse is not None:
        raise CoterieError("--coarse has no effect: all experts fit into what is free as they are")
    return found


def _kept_as(
    folder: Path, stored: ModelSpec, asked: str | Format | None, device: torch.device
) -> ModelSpec:
    """The model in memory: its experts as stored, or as asked where they are stored whole."""
    wanted = parse_format(asked) if isinstance(asked, str) else asked
    if wanted not in (None, stored.expert_format):
        if stored.expert_format is not None or stored.panels:
            raise CoterieError(
                f"{folder}: its experts are {stored.experts_as} already; "
                f"{wanted} can be made of the original only"
            )
        return replace(stored, expert_format=wanted)
    panels = stored.panels and not behind.far(device) and cpu.ready()
    return replace(stored, panels=panels)


def _agreed_mask(config: Config, codec: Codec, usual: int) -> int:
    """The tokenizer's, which a config that states one must agree with; else the ``usual`` one."""
    if codec.mask is None:
        return usual
    if config.values.get("mask_token_id") is not None and usual != codec.mask:
        raise config.error("mask_token_id", f"is {usual}, but tokenizer.json has {codec.mask}")
    return codec.mask


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one; asking for what is not there raises."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise CoterieError(f"unknown device {str(device)!r}; known: auto, cpu, cuda") from None
    if chosen.type not in ("cpu", "cuda"):
        raise CoterieError(f"unknown device {str(device)!r}; known: auto, cpu, cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise CoterieError(f"device {str(device)!r} is not there: PyTorch sees no such GPU")
    return chosen


def choose_dtype(
    dtype: str | torch.dtype | None, spec: ModelSpec, device: torch.device
) -> torch.dtype:
    """None and "auto" are bf16, or fp32 on a CPU where the weights stay small; others by name."""
    if dtype is None or dtype == "auto":
        small = bytes_kept(spec, torch.float32) < SMALL
        return torch.float32 if device.type == "cpu" and small else torch.bfloat16
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise CoterieError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise CoterieError(f"unsupported dtype {dtype}; known: {', '.join(DTYPES)}")
    return dtype


def _load_weights(
    folder: Path,
    family: Family,
    spec: ModelSpec,
    kept: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory: Settled | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Transformer, Store]:
    """Everything is checked before the first byte of memory is asked for."""
    checkpoint = Checkpoint.of(folder)
    places = weight_map(family.names, spec, stacked=is_stacked(checkpoint.tensors))
    checkpoint.check(places)
    memory = None if memory is None or memory.whole else memory
    away = 0 if memory is None else memory.absent
    _check_room(folder, bytes_kept(kept, dtype) - away, device)
    weights = allocate(kept, dtype, device, experts=memory is None)
    host = Behind(kept, dtype, memory, device) if memory and behind.far(device) else None
    if host is not None and host.holds_all:
        weights |= host.weights()
    left = memory is not None and not (host is not None and host.holds_all)
    told = _running_total(checkpoint.bytes, progress)
    checkpoint.load(places, Filling(spec, kept, weights, left=left), told)
    if host is not None:
        store = host.store(checkpoint, places, spec)
        return build(kept, weights, store), store
    if memory is not None:
        store = (
            offloaded(checkpoint, places, kept, memory)
            if memory.asked.coarse is None
            else mixed(Packed(checkpoint, places, kept), memory, memory.asked.coarse)
        )
        return build(kept, weights, store), store
    slabs = {
        layer: ops.prepare(take_slab(kept, layer, weights), spend=True) for layer in kept.moe_layers
    }
    store = Resident(slabs)
    return build(kept, weights, store), store


def _running_total(
    whole: int, progress: Callable[[int, int], None] | None
) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def heard(size: int) -> None:
        nonlocal done
        done += size
        progress(done, whole)

    return heard


def _check_room(folder: Path, needed: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and needed > free:
        gib = 1 << 30
        raise CoterieError(
            f"{folder}: the weights need {needed / gib:.1f} GiB, {free / gib:.1f} GiB are free "
            f"on {device}"
        )
