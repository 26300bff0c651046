"""Times how a large checkpoint loads: packed and mapped, against matrices read and packed then.

    scripts/loading FOLDER --make     # writes the models
    scripts/loading FOLDER            # times them

Random weights of LLaDA2.0-mini's shape with fewer layers; every load is in a process of its own.
"cold" asks the system to forget the files first; what lies below it may still have them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TypedDict

import torch

from coterie import ops
from coterie.checkpoints.manifest import MANIFEST, Checksums
from coterie.checkpoints.output_files import PAGE_BYTES, safetensors_header
from coterie.families.common import EXPERT_FORMAT_KEY, EXPERT_LAYOUT_KEY, PANEL_LAYOUT
from coterie.families.names import is_expert, layer_of, weight_map
from coterie.lab.records import Measurement, make_record, write_record
from coterie.loading.load import load_model
from coterie.model.checkpoint import INDEX_FILE
from coterie.model.moe import MoE
from coterie.model.spec import ModelSpec
from coterie.model.weights import TensorTarget, is_packed
from coterie.ops import cpu
from coterie.ops.packed_layout import LAYOUT_VERSION
from coterie.quantization import FORMATS, quantize
from coterie.testing import read_spec, tiny_config
from coterie.values import ExpertRequest, PackedExperts, Slab

MINI: Mapping[str, int] = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}
ROUNDS, DISTINCT = 5, 4
STATES = ("warm", "cold")
GB = 1e9


class Facts(TypedDict):
    """How one model loads: seconds by state of the files, bytes of memory."""

    bytes: int
    seconds: dict[str, list[float]]
    peak: float  # resident at most, above what the process had before
    own: float  # resident afterwards, not backed by a file
    mapped: float  # resident afterwards, of files


def main(words: Sequence[str]) -> int:
    asked = options().parse_args(words)
    if asked.child:
        print(json.dumps(loaded(asked.folder)))
        return 0
    if asked.make:
        for name in asked.kinds:
            make(asked.folder / name, name, layers=asked.layers, vocabulary=asked.vocabulary)
        return 0
    found = {name: timed(asked.folder / name, asked.rounds) for name in asked.kinds}
    for name, facts in found.items():
        print(name, json.dumps(facts))
    measures = [
        Measurement(f"{name}, {state}", "s", tuple(facts["seconds"][state]))
        for name, facts in found.items()
        for state in STATES
    ]
    packed = [name for name in found if KINDS[name][1]]
    measures += [m for name in packed for m in bandwidths(asked.folder / name, asked.rounds)]
    measures += checksums()
    facts = {"layers": asked.layers, "vocabulary": asked.vocabulary, "kinds": found}
    told = [asked.folder.name if word == str(asked.folder) else word for word in words]
    content = make_record(asked.title, ["scripts/loading", *told], measures, facts=facts)
    print(write_record(asked.out, content))
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/loading", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the models are, or are made")
    parser.add_argument("--make", action="store_true", help="write the models, and no more")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--title", default="Loading packed", help="of the record")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser


def make(folder: Path, name: str, *, layers: int, vocabulary: int) -> None:
    """A checkpoint of that kind, the experts of a layer in a file, a few over and over."""
    kind, panels = KINDS[name]
    sizes = {**MINI, "num_hidden_layers": layers, "vocab_size": vocabulary}
    config = {**tiny_config("llada2"), **sizes, "dtype": "bfloat16"}
    config |= {} if kind == "bf16" else {EXPERT_FORMAT_KEY: FORMATS[kind].to_dict()}
    config |= (
        {EXPERT_LAYOUT_KEY: {"name": PANEL_LAYOUT, "version": LAYOUT_VERSION}} if panels else {}
    )
    family, spec = read_spec(config)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    places = weight_map(family.tensor_names, spec, stacked=False)
    owner = {
        at: f"experts-{layer_of(place)}.safetensors" if is_expert(place) else "rest.safetensors"
        for at, place in places.items()
    }
    sums: dict[str, dict[str, object]] = {}
    for file in dict.fromkeys(owner.values()):
        held = {at: place for at, place in places.items() if owner[at] == file}
        sums |= {at: {"file": file, **of} for at, of in write(folder / file, held, spec).items()}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": owner}))
    (folder / MANIFEST).write_text(json.dumps({"tensors": sums}))
    (folder / "config.json").write_text(json.dumps(config))


def write(path: Path, held: Mapping[str, TensorTarget], spec: ModelSpec) -> Checksums:
    """The file, and the checksums of what is in it, as a conversion would list them."""
    kinds = {name: (place.shape, place.dtype or torch.bfloat16) for name, place in held.items()}
    sums: Checksums = {}
    with path.open("wb") as sink:
        sink.write(safetensors_header(kinds, PAGE_BYTES))
        for name, place in held.items():
            digest, each = hashlib.sha256(), []
            for piece in contents(place, prod(kinds[name][0]) * kinds[name][1].itemsize, spec):
                sink.write(piece)
                if is_packed(place.weight):
                    stride = spec.expert_stride
                    blobs = (piece[at : at + stride] for at in range(0, len(piece), stride))
                    each += [f"{zlib.crc32(blob):08x}" for blob in blobs]
                else:
                    digest.update(piece)
            sums[name] = {"crc32": each} if each else {"sha256": digest.hexdigest()}
        sink.flush()
        os.fsync(sink.fileno())
    return sums


def contents(place: TensorTarget, size: int, spec: ModelSpec) -> Iterator[memoryview]:
    """So many bytes that may stand for weights: finite, small, and not all alike."""
    draw = torch.Generator().manual_seed(size)
    if is_packed(place.weight):
        pool = torch.cat([blob(spec, draw) for _ in range(DISTINCT)])
    elif place.dtype in (torch.int8, torch.uint8):
        pool = torch.randint(0, 256, (1 << 22,), dtype=torch.uint8, generator=draw)
    else:
        pool = (torch.randn(1 << 21, generator=draw) * 0.02).bfloat16().view(torch.uint8)
    while size > 0:
        piece = pool[:size].numpy().data
        yield piece
        size -= len(piece)


def blob(spec: ModelSpec, draw: torch.Generator) -> torch.Tensor:
    hidden, width, form = spec.hidden, spec.expert_width, spec.expert_format
    whole = [
        torch.randn(1, *shape, generator=draw) * 0.02
        for shape in ((2 * width, hidden), (hidden, width))
    ]
    kept = [w.bfloat16() if form is None else quantize(w, form) for w in whole]
    packed = ops.pack(Slab(*kept, torch.zeros(1, dtype=torch.int64))).gate_up
    assert isinstance(packed, PackedExperts)
    return packed.packed[0]


def timed(folder: Path, rounds: int) -> Facts:
    """Seconds of loads in new processes, and the memory of the last warm one."""
    runs = {state: [child(folder, state) for _ in range(rounds)] for state in STATES}
    last = runs["warm"][-1]
    return Facts(
        bytes=sum(file.stat().st_size for file in folder.iterdir()),
        seconds={state: [run["seconds"] for run in found] for state, found in runs.items()},
        peak=last["peak"],
        own=last["own"],
        mapped=last["mapped"],
    )


def bandwidths(folder: Path, rounds: int) -> list[Measurement]:
    """A layer's experts read as the kernels read: mapped, and copied to huge pages; in turns."""
    model = load_model(folder, dtype="bf16", device="cpu")
    layer = model.spec.moe_layers[0]
    feed_forward = model.transformer.layers[layer].feed_forward
    assert isinstance(feed_forward, MoE)
    everybody = torch.ones(model.spec.router.experts, dtype=torch.bool)
    [mapped] = feed_forward.store.serve(layer, ExpertRequest(everybody))
    panels = mapped.gate_up
    assert isinstance(panels, PackedExperts)
    memory = cpu.allocate(*panels.packed.shape)
    memory.copy_(panels.packed)
    copy = replace(panels, packed=memory)
    slabs = {"map": mapped, "huge pages": Slab(copy, copy, mapped.slot_of)}
    taken: dict[str, list[float]] = {name: [] for name in slabs}
    for turn in range(4 * rounds + 1):
        for name, slab in slabs.items():
            began = time.perf_counter()
            cpu.read_experts(slab, everybody)
            if turn:
                taken[name].append(panels.nbytes / (time.perf_counter() - began) / GB)
    return [
        Measurement(f"{folder.name}, read from {name}", "GB/s", tuple(found))
        for name, found in taken.items()
    ]


def checksums() -> list[Measurement]:
    """How fast bytes are summed up on one thread: an expert's at a time, each by every sum."""
    content = torch.randint(256, (1 << 28,), dtype=torch.uint8)
    sums: dict[str, Callable[[torch.Tensor], object]] = {
        "crc32 by the kernel": cpu.crc32,
        "crc32 by zlib": lambda given: zlib.crc32(given.numpy().data),
        "sha256": lambda given: hashlib.sha256(given.numpy().data).digest(),
        "blake2b": lambda given: hashlib.blake2b(given.numpy().data).digest(),
    }
    found: dict[str, list[float]] = {name: [] for name in sums}
    for piece in content.split(1 << 26):
        for name, sum_ in sums.items():
            began = time.perf_counter()
            for blob in piece.split(1 << 22):
                sum_(blob)
            found[name].append(len(piece) / (time.perf_counter() - began) / GB)
    return [Measurement(name, "GB/s", tuple(rates)) for name, rates in found.items()]


def child(folder: Path, state: str) -> dict[str, float]:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        if state == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, 1 << 24):
                pass
        os.close(descriptor)
    words = [sys.executable, __file__, str(folder), "--child"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def loaded(folder: Path) -> dict[str, float]:
    """Of this process: how long it takes to load, and what memory that takes at most."""
    ops.prepare(Slab(torch.ones(1, 2, 1), torch.ones(1, 1, 1), torch.arange(1)))
    before = memory("VmRSS")
    began = time.perf_counter()
    model = load_model(folder, dtype="bf16", device="cpu")
    seconds = time.perf_counter() - began
    assert model.spec.layers > 0
    return {
        "seconds": seconds,
        "peak": memory("VmHWM") - before,
        "own": memory("RssAnon"),
        "mapped": memory("RssFile"),
    }


def memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(name + r":\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


KINDS: Mapping[str, tuple[str, bool]] = {
    "int8-packed": ("int8", True),
    "int8-plain": ("int8", False),
    "bf16-packed": ("bf16", True),
    "bf16-plain": ("bf16", False),
}
"""By name: what the experts are in, and whether they are packed."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
