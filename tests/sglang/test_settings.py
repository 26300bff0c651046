"""The settings of the plug-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coterie.errors import ConfigError
from coterie.routing import DesVote, Election, format_policy
from coterie.sglang.settings import OPTIONS, read_settings


def test_without_variables_there_are_no_settings() -> None:
    assert read_settings({"HOME": "/", "COTERIE_ISA": "avx2"}) is None


def test_a_policy_alone_has_the_default_settings() -> None:
    settings = read_settings({"COTERIE_POLICY": "des-vote:beta=0.15"})
    assert settings is not None
    assert settings.policy == DesVote(0.15)
    assert (settings.commit, settings.prefill, settings.prompt_votes) == (None, "vanilla", False)


def test_every_option_is_read(tmp_path: Path) -> None:
    text = {
        "COTERIE_POLICY": "des-vote:beta=0.15",
        "COTERIE_SCOPE": "batch",
        "COTERIE_COMMIT": "policy",
        "COTERIE_PREFILL": "policy",
        "COTERIE_PROMPT_VOTES": "yes",
        "COTERIE_COUNTS": str(tmp_path / "counts"),
        "COTERIE_COUNTS_EVERY": "7",
    }
    assert text.keys() == OPTIONS.keys()
    settings = read_settings(text)
    assert settings is not None
    assert settings.policy == DesVote(0.15, Election(scope="batch"))
    assert (settings.commit, settings.prefill, settings.prompt_votes) == ("policy", "policy", True)
    assert (settings.counts_file, settings.counts_every) == (tmp_path / "counts", 7)


def test_a_calibrated_policy_is_read_from_its_file(tmp_path: Path) -> None:
    model = {"name": "tiny", "fingerprint": "0", "layers": 2, "experts": 16}
    content = {"policy": "des-vote:beta=0.5/0.25", "model": model}
    (tmp_path / "policy.json").write_text(json.dumps(content))
    settings = read_settings({"COTERIE_POLICY": f"@{tmp_path}/policy.json"})
    assert settings is not None
    assert format_policy(settings.policy) == "des-vote:beta=0.5/0.25"


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"COTERIE_POLICY": "vanilla", "COTERIE_POLICIES": "vanilla"}, "COTERIE_POLICIES"),
        ({"COTERIE_SCOPE": "block"}, "COTERIE_POLICY"),
        ({"COTERIE_POLICY": "des-vot"}, "des-vot"),
        ({"COTERIE_POLICY": "@missing.json"}, "missing.json"),
        ({"COTERIE_POLICY": "topk:k=2", "COTERIE_SCOPE": "batch"}, "COTERIE_SCOPE"),
        ({"COTERIE_POLICY": "vanilla", "COTERIE_COMMIT": "never"}, "COTERIE_COMMIT"),
        ({"COTERIE_POLICY": "vanilla", "COTERIE_PREFILL": ""}, "COTERIE_PREFILL"),
        ({"COTERIE_POLICY": "vanilla", "COTERIE_PROMPT_VOTES": "1"}, "COTERIE_PROMPT_VOTES"),
        ({"COTERIE_POLICY": "vanilla", "COTERIE_COUNTS_EVERY": "0"}, "COTERIE_COUNTS_EVERY"),
        ({"COTERIE_POLICY": "mc-moe:beta=0.6"}, "attention"),
        ({"COTERIE_POLICY": "random:beta=0.5"}, "random"),
        ({"COTERIE_POLICY": "coreset:beta=0.5,vote=random"}, "random"),
        ({"COTERIE_POLICY": "resident-vote:beta=0.5"}, "memory"),
        ({"COTERIE_POLICY": "des-vote:beta=0.5,max=slots"}, "slots"),
        ({"COTERIE_POLICY": "des-vote:beta=0.5,voters=uncertain"}, "voters=uncertain"),
        ({"COTERIE_POLICY": "des-vote:beta=0.5,voters=before-eos"}, "voters=before-eos"),
    ],
)
def test_what_cannot_be_obeyed_is_an_error(variables: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        read_settings(variables)
