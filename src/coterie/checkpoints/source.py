"""From a name to a folder: the embedded model, a folder on disk, or a repository on the hub."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from huggingface_hub import snapshot_download

from coterie.checkpoints.manifest import JOURNAL
from coterie.errors import CoterieError

EMBEDDED = "embedded"
CONFIG_FILES = ("config.json",)
# No code and no pickles: nothing else of a repository is ever asked for.
MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "manifest.json"),
    *("*.safetensors", "model.safetensors.index.json"),
)
HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def find_folder(name: str | Path | None, patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """The folder that holds a model; None and "embedded" are the one in the package.

    A hub id is "owner/name", or "owner/name@revision"; only its ``parts`` are downloaded, into the
    hub's own cache. Raises CoterieError where there is nothing under that name.
    """
    if name is None or str(name) == EMBEDDED:
        return _embedded_folder()
    path = Path(name).expanduser()
    if (path / JOURNAL).exists():
        raise CoterieError(
            f"{name}: its conversion was not finished; the same `coterie quantize` goes on with it"
        )
    if path.is_dir():
        return path
    if path.exists():
        raise CoterieError(f"{name}: not a folder; a model is a folder with a config.json")
    if not isinstance(name, str) or not _is_hub_id(name):
        raise CoterieError(f"{name}: no such folder (and not a hub id such as owner/name)")
    return _download(name, patterns)


def _embedded_folder() -> Path:
    folder = Path(str(resources.files("coterie") / EMBEDDED))
    if not (folder / "config.json").is_file():
        raise CoterieError(f"{folder}: the embedded model is not installed; name another")
    return folder


def _is_hub_id(name: str) -> bool:
    """A name of two parts whose first is no folder here: "runs/a" beside a runs/ is a typo."""
    return (
        HUB_ID_PATTERN.fullmatch(name) is not None
        and not Path(name.split("/", maxsplit=1)[0]).exists()
    )


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns))
        )
    # The hub's library raises its own, the network library's and the system's errors.
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise CoterieError(
            f"{name}: not a folder here, and the hub did not deliver it "
            f"({type(error).__name__}: {reason[:200]})"
        ) from None
