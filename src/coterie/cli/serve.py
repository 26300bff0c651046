"""``coterie serve``: an OpenAI-compatible server, and a page that shows the vote."""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from coterie.checkpoints.source import EMBEDDED
from coterie.cli import engine_options as engines
from coterie.cli import output
from coterie.engine.engine import Engine
from coterie.errors import ConfigError
from coterie.offload.capacity import parse_bytes
from coterie.server.settings import AllowedOptions, ServerSettings

KEY_VARIABLE = "COTERIE_API_KEY"
QUESTION = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
OPEN_NOTE = (
    "other machines can connect, and no key is needed: --api-key or $" + KEY_VARIABLE + " sets one"
)


@dataclass(frozen=True)
class NetworkOptions:
    """Where the server listens, and what clients may do."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: list[str] | None = None
    served_model_name: str | None = None
    allow_policy: list[str] | None = None
    log_prompts: bool = False


@dataclass(frozen=True)
class LimitOptions:
    """What requests may take of time and memory."""

    max_batch_size: int = 16
    max_queue: int = 128
    max_model_len: int | None = None
    deadline: float = 600.0
    max_body: str = "4MiB"
    drain: float = 60.0
    prefill_chunk: int | None = 512
    prefix_cache: str = "256MiB"


def serve(
    name: str | None = None, *, policy: str = engines.VANILLA, network: NetworkOptions,
    limits: LimitOptions, decode: engines.DecodeOptions, engine_options: engines.EngineOptions,
    auto: bool = False,
) -> None:  # fmt: skip
    """Serve a model to OpenAI clients, with a page that shows which experts are elected.

    \b
    coterie serve                       the model in the package, on http://127.0.0.1:8000
    coterie serve ./LLaDA2.0-mini-int8 --policy des-vote:beta=0.15
    coterie serve ./model --expert-memory 35% --policy resident-vote:beta=0.3
    coterie serve ./model --auto        choose the experts' format and memory
    coterie serve ./model --policy des-vote:beta=0.15,scope=batch --max-batch-size 8
    coterie serve ./model --host 0.0.0.0 --allow-policy 'des-vote:*'

    \b
    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(
        model="embedded", messages=[{"role": "user", "content": "..."}],
        extra_body={"policy": "des-vote:beta=0.3"})

    \b
    /v1/chat/completions /v1/completions /v1/models   as OpenAI; fields: docs/server.md
    /tokenize /detokenize /version                    as vLLM
    /health /ready /metrics                           for probes and Prometheus

    The policy and the options of decoding are defaults. A request may set others, as far as
    --allow-policy lets it.
    """
    http_server = output.require_extra("coterie.server.http_server", "coterie serve", "serve")
    if name is not None and engine_options.model is not None:
        raise ConfigError("MODEL and --model are the same; give one of them")
    engine_options = replace(engine_options, model=name or engine_options.model)
    settings = _settings(network, limits, engine_options.model)
    options, spec = decode.to_fields(), engines.canonical_policy(policy)
    cache = 0 if limits.prefix_cache == "0" else parse_bytes(limits.prefix_cache, "`prefix_cache`")
    with http_server.bind(settings) as listener:
        if auto:
            engine_options = engines.planned_options(engine_options, spec)
        opened = engine_options.open()
        engines.check_engine(opened, [policy], options)
        engine = Engine(
            opened.model, policy=spec,
            generation=opened.generation.replace(**options),
            prefill_chunk=limits.prefill_chunk, prefix_cache_bytes=cache,
        )  # fmt: skip
        http_server.serve(engine, settings, listener, lambda port: _greet(settings, port))


def _settings(network: NetworkOptions, limits: LimitOptions, model: str | None) -> ServerSettings:
    keys = network.api_key or [os.environ.get(KEY_VARIABLE, "")]
    folder = Path(model or EMBEDDED)
    return ServerSettings(
        model_name=network.served_model_name or (folder.name if folder.exists() else str(folder)),
        host=network.host, port=network.port, api_keys=tuple(filter(None, keys)),
        allowed=AllowedOptions.parse(network.allow_policy or ()), log_prompts=network.log_prompts,
        max_batch_size=limits.max_batch_size, max_queue=limits.max_queue,
        max_model_len=limits.max_model_len, deadline=limits.deadline, drain=limits.drain,
        max_body_bytes=parse_bytes(limits.max_body, "`max_body`"),
    )  # fmt: skip


def _greet(settings: ServerSettings, port: int) -> None:
    """Print the page's address and an example; warn if any machine can connect without a key."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = "-H 'authorization: Bearer KEY' " if settings.api_keys else ""
    body = f'{{"messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
    output.print_note(f"serving {settings.model_name} on {url}/v1, with a page on {url}/")
    output.print_note(
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' {key}"
        f"-d {shlex.quote(body)}"
    )
    output.print_note("Ctrl-C ends it after the running requests; a second one at once")
    if not settings.is_loopback and not settings.api_keys:
        output.print_note(OPEN_NOTE)
