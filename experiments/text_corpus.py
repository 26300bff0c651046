"""Builds the corpus of the text model: a folder of text files, with every 25th file held out.

`python -m experiments text-corpus --out corpus --gsm8k train.jsonl --mbpp mbpp.jsonl`. Sources are
the standard library of the Python in use, Debian's documentation packages, and the training halves
of two data sets. `sources.json` states the licence, the version and the size of each.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

HELD_OUT_EVERY = 25  # files
RECORDS_PER_FILE = 20  # of a data set
MAX_NON_ASCII = 0.02  # of a file's characters: other languages are left out
SKIPPED = {"test", "tests", "lib2to3", "site-packages", "encodings", "pydoc_data", "translations"}
MBPP_TRAINING = range(601, 975)  # task ids
Documents = Iterator[tuple[str, str]]  # names and texts


@dataclass(frozen=True)
class DebianPackage:
    """The files of a Debian package that end as ``suffix`` says."""

    name: str
    suffix: str
    licence: str

    def documents(self, work: Path) -> Documents:
        subprocess.run(["apt-get", "download", "-q", self.name], cwd=work, check=True)
        (archive,) = sorted(work.glob(f"{self.name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, work / self.name], check=True)
        return _read_folder(work / self.name, self.suffix)


PACKAGES = (
    DebianPackage("python3.11-doc", ".rst.txt", "PSF-2.0"),
    DebianPackage("linux-doc-6.1", ".rst.gz", "GPL-2.0"),
    DebianPackage("git-doc", ".txt", "GPL-2.0"),
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="experiments text-corpus", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, help="train.jsonl (MIT)")
    parser.add_argument("--mbpp", type=Path, help="mbpp.jsonl (CC BY 4.0)")
    options = parser.parse_args(argv)
    work = options.out / "packages"
    work.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources: dict[str, object] = {
        "python": _write(options.out, "python", _read_folder(library, ".py"))
        | {"licence": "PSF-2.0", "version": sys.version.split()[0]}
    }
    for package in PACKAGES:
        facts = _write(options.out, package.name, package.documents(work))
        version = next(work.glob(f"{package.name}_*.deb")).name.split("_")[1]
        sources[package.name] = facts | {"licence": package.licence, "version": version}
    if options.gsm8k:
        facts = _write(options.out, "gsm8k", _group(map(_gsm8k_text, _records(options.gsm8k))))
        sources["gsm8k"] = facts | {"licence": "MIT"}
    if options.mbpp:
        training = (r for r in _records(options.mbpp) if r["task_id"] in MBPP_TRAINING)
        facts = _write(options.out, "mbpp", _group(map(_mbpp_text, training)))
        sources["mbpp"] = facts | {"licence": "CC-BY-4.0"}
    (options.out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    print(json.dumps(sources, indent=1))
    return 0


def _write(out: Path, source: str, documents: Documents) -> dict[str, object]:
    """Write a source's documents, and count them; a hash of the name decides what is held out."""
    counts, digest = {"train": [0, 0], "held-out": [0, 0]}, sha256()
    for name, text in documents:
        half = "held-out" if zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0 else "train"
        path = out / half / source / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        counts[half][0] += 1
        counts[half][1] += len(text.encode())
        digest.update(text.encode())
    return {
        "sha256": digest.hexdigest(),
        **{half: {"files": files, "bytes": size} for half, (files, size) in counts.items()},
    }


def _read_folder(folder: Path, suffix: str) -> Documents:
    for path in sorted(folder.rglob(f"*{suffix}")):
        name = path.relative_to(folder)
        if path.is_symlink() or SKIPPED & set(name.parts):
            continue
        content = path.read_bytes()
        text = (gzip.decompress(content) if suffix.endswith(".gz") else content).decode(
            errors="replace"
        )
        text = text.replace("\r\n", "\n").strip() + "\n"
        if sum(not c.isascii() for c in text) <= MAX_NON_ASCII * len(text) and len(text) > 200:
            yield re.sub(r"\W+", "_", str(name)).strip("_"), text


def _records(path: Path) -> Iterator[Mapping]:
    return map(json.loads, path.read_text().splitlines())


def _gsm8k_text(record: Mapping[str, str]) -> str:
    answer = re.sub(r"<<.*?>>", "", record["answer"])
    return f"Question: {record['question']}\nAnswer: {answer}\n"


def _mbpp_text(record: Mapping) -> str:
    code = record["code"].replace("\r\n", "\n").replace("\t", "    ")
    tests = "\n".join(record["test_list"])
    return f'"""{record["text"]}"""\n\n{code}\n\n{tests}\n'


def _group(texts: Iterator[str]) -> Documents:
    """Documents of some records each, so that short records make no file of their own."""
    every = list(texts)
    for start in range(0, len(every), RECORDS_PER_FILE):
        yield f"{start:05}", "\n".join(every[start : start + RECORDS_PER_FILE])
