"""Locates a model by name: a model in the package, a folder, or a repository on the hub."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from coterie.checkpoints.journal import JOURNAL
from coterie.errors import CheckpointError

EMBEDDED, TEXT = "embedded", "text"
CONFIG_FILES = ("config.json",)
# Only these are downloaded: no code and no pickles.
MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "manifest.json"),
    *("*.safetensors", "model.safetensors.index.json"),
)
HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def find_folder(name: str | Path | None, patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """The folder of a model; None and "embedded" name the embedded model, "text" the text model.

    A hub id is "owner/name" or "owner/name@revision". Files that match ``patterns`` are downloaded
    into the hub's cache. Raises CheckpointError if there is no such model.
    """
    if name is None or str(name) in (EMBEDDED, TEXT):
        return _packaged_folder(EMBEDDED if name is None else str(name))
    if not str(name).strip():
        raise CheckpointError("the model has an empty name")  # which would be this folder
    path = Path(name).expanduser()
    if (path / JOURNAL).exists():
        raise CheckpointError(
            f"{name}: its conversion was not finished; the same `coterie quantize` resumes it"
        )
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name}: not a folder; a model is a folder with a config.json")
    if not isinstance(name, str) or not _is_hub_id(name):
        raise CheckpointError(f"{name}: no such folder (and not a hub id such as owner/name)")
    return _download(name, patterns)


def _packaged_folder(name: str) -> Path:
    folder = Path(str(resources.files("coterie") / name))
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"{folder}: the weights of the {name} model are not installed; name another model, or "
            "train it with `coterie train`"
        )
    return folder


def _is_hub_id(name: str) -> bool:
    """Whether this is "owner/name", and not a misspelled path below an existing folder."""
    return (
        HUB_ID_PATTERN.fullmatch(name) is not None
        and not Path(name.split("/", maxsplit=1)[0]).exists()
    )


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from coterie.checkpoints import hub  # slow to import, and rarely needed

    repository, _, revision = name.partition("@")
    try:
        with hub.hub_requests(name):
            folder = hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=list(patterns)
            )
    # The hub's library raises its own errors, those of the network library and of the system.
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise CheckpointError(
            f"{name}: no such folder, and the download from the hub failed "
            f"({type(error).__name__}: {reason[:200]})"
        ) from None
    return Path(folder)
