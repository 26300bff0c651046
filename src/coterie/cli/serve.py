"""``coterie serve``: an OpenAI-compatible server, and a page that shows the vote."""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from coterie.checkpoints.source import EMBEDDED
from coterie.cli import engine_options as engines
from coterie.cli import options as o
from coterie.cli import output
from coterie.engine.engine import Engine
from coterie.errors import ConfigError
from coterie.offload.capacity import parse_bytes
from coterie.server.settings import AllowedOptions, ServerSettings

KEY_VARIABLE = "COTERIE_API_KEY"
network, limits = o.panel("Where to listen, and what to allow"), o.panel("How much to serve")
ALLOW_HELP = (
    "Pattern of policies that a request may set (des-vote:*), or of another option "
    "(unmask=threshold:*, kv_cache=*, block=32); may be repeated (default: all)."
)
KEY_HELP = f"Key that clients must send; may be repeated (default: ${KEY_VARIABLE})."
QUESTION = "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
OPEN_NOTE = (
    "other machines can connect, and no key is needed: --api-key or $" + KEY_VARIABLE + " sets one"
)


@dataclass(frozen=True)
class NetworkOptions:
    """Where the server listens, and what clients may do."""

    host: Annotated[str, network("Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1"
    port: Annotated[int, network("Port to listen on; 0 takes a free one.", min=0)] = 8000
    api_key: Annotated[list[str] | None, network(KEY_HELP)] = None
    served_model_name: Annotated[
        str | None, network("Name of the model in the API (default: the folder's).")
    ] = None
    allow_policy: Annotated[list[str] | None, network(ALLOW_HELP)] = None
    log_prompts: Annotated[bool, network("Write prompts to the log.", "--log-prompts")] = False


@dataclass(frozen=True)
class LimitOptions:
    """What requests may take of time and memory."""

    max_batch_size: Annotated[int, limits("Requests that share forwards.", min=1)] = 16
    max_queue: Annotated[int, limits("Requests that may wait; further ones get 429.", min=0)] = 128
    max_model_len: Annotated[
        int | None, limits("Most tokens of a prompt and its answer (default: the model's).", min=1)
    ] = None
    deadline: Annotated[float, limits("Seconds until a request gets a 504.", min=0.001)] = 600.0
    max_body: Annotated[str, limits("Largest body of a request, in bytes (4MiB).")] = "4MiB"
    drain: Annotated[float, limits("Seconds for running requests after SIGTERM.", min=0)] = 60.0
    prefill_chunk: Annotated[
        int | None, limits("Tokens of a prompt that one forward prefills (512).", min=1)
    ] = 512
    prefix_cache: Annotated[
        str, limits("Memory for keys of earlier prompts: bytes; 0 keeps none.")
    ] = "256MiB"


@o.with_option_groups
def serve(
    name: o.ModelArgument = None, *, policy: o.PolicySpec = engines.VANILLA,
    network: NetworkOptions, limits: LimitOptions, decode: engines.DecodeOptions,
    engine_options: engines.EngineOptions,
) -> None:  # fmt: skip
    """Serve a model to OpenAI clients, with a page that shows which experts are elected.

    \b
    coterie serve                       the model in the package, on http://127.0.0.1:8000
    coterie serve ./LLaDA2.0-mini-int8 --policy des-vote:beta=0.15
    coterie serve ./model --expert-memory 35% --policy resident-vote:beta=0.3
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
    opened = engine_options.open()
    engines.check_engine(opened, [policy], options)
    engine = Engine(
        opened.model, policy=spec,
        generation=opened.generation.replace(**options),
        prefill_chunk=limits.prefill_chunk, prefix_cache_bytes=cache,
    )  # fmt: skip
    http_server.serve(engine, settings, lambda port: _greet(settings, port))


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
    """Where the page is, and how to ask; a warning where any machine can."""
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
