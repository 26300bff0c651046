"""What an operator decides: limits, keys, and which decoding options a request may set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from coterie.errors import ConfigError

RESTRICTED_OPTIONS = (
    "policy",
    "kv_cache",
    "block",
    "unmask",
    "commit_routing",
    "prefill_routing",
    "reuse_tolerance",
    "skip_settled",
)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class AllowedOptions:
    """Which values of ``RESTRICTED_OPTIONS`` a request may give: (option, glob) pairs.

    Without any pair, all values are allowed.
    """

    patterns: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(texts: Sequence[str]) -> AllowedOptions:
        """The pairs of globs of policies (``des-vote:*``), or of another option (``block=32``)."""
        patterns = []
        for text in texts:
            option, equals, glob = text.partition("=")
            is_option = bool(equals) and option in RESTRICTED_OPTIONS
            patterns.append((option, glob) if is_option else ("policy", text))
        return AllowedOptions(tuple(patterns))

    def allows(self, option: str, value: object) -> bool:
        """Whether a request may set the option to this value."""
        text = str(value)
        matches = (name == option and fnmatchcase(text, glob) for name, glob in self.patterns)
        return not self.patterns or any(matches)

    def describe(self) -> str:
        """The pairs as an operator wrote them."""
        return ", ".join(
            glob if name == "policy" else f"{name}={glob}" for name, glob in self.patterns
        )


@dataclass(frozen=True)
class ServerSettings:
    """Limits and rules of one server. Raises ConfigError for a value that cannot work."""

    model_name: str = "embedded"
    host: str = "127.0.0.1"
    port: int = 8000
    max_batch_size: int = 16  # rows that share forwards
    max_queue: int = 128  # requests that wait for a row
    max_model_len: int | None = None  # prompt and new tokens; None: the model's
    deadline: float = 600.0  # seconds from arrival to the last token
    drain: float = 60.0  # seconds that running requests get after SIGTERM
    max_body_bytes: int = 4 << 20
    body_seconds: float = 30.0  # in which a body must have arrived
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed: AllowedOptions = AllowedOptions()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_body_bytes", "deadline", "body_seconds"):
            if not getattr(self, name) > 0:  # NaN is not
                raise ConfigError(f"`{name}` must be above 0, not {getattr(self, name)}")
        for name in ("max_queue", "drain"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"`{name}` must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"`port` must be between 0 and 65535, not {self.port}")
        if any(not key or not key.isascii() for key in self.api_keys):
            raise ConfigError("`api_key` must be ASCII text, and not empty")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK or self.host.startswith("127.")
