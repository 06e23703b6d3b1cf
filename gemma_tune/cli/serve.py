"""`gemma-tune serve`: answers over HTTP."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from gemma_tune.cli.flags import setting_flags
from gemma_tune.cli.output import Output
from gemma_tune.cli.server_address import allowed_hosts, announce, server_address
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.errors import ConfigError
from gemma_tune.serve_config import ServeConfig

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
# Setting of ServeConfig, whose docstring says more -> (group, help).
_SERVER_FLAGS = {
    "host": ("Server", "Address to listen at. 0.0.0.0: all addresses of this machine."),
    "port": ("Server", "Port to listen at. 0: any free port."),
    "name": ("Server", "Name of the model in requests. Without it, the last part of --model."),
    "api_key_file": ("Server", "File of API keys, one a line. Requests must send one as Authorization: Bearer KEY."),
    "allowed_hosts": ("Server", "Host names that requests may address, with commas between."),
    "cors_origins": ("Server", "Origins of web pages that may send requests from a browser, with commas between."),
    "feedback_db": ("Server", "SQLite file for users' feedback on answers. Empty: none is kept."),
    "log_requests": ("Server", "Print a line for each request."),
    "max_concurrent": ("Limits", "Number of answers that are generated at the same time."),
    "max_tokens_in_flight": ("Limits", "Size of the KV cache: tokens of all these prompts and answers together."),
    "max_length": ("Limits", "Maximum length of a prompt and its answer together, in tokens."),
    "max_queued": ("Limits", "Number of answers that may wait. Further requests get status 429."),
    "max_answers": ("Limits", "Largest n of a request."),
    "max_body_bytes": ("Limits", "Maximum size of a request, in bytes."),
    "request_timeout_seconds": ("Limits", "Maximum duration of a request."),
    "drain_seconds": ("Limits", "Time that running requests get to finish after SIGTERM."),
}


def _run(invocation: Invocation) -> dict[str, Any]:
    """Serves until a signal ends it."""
    _check_packages()
    flags, output = invocation.flags, invocation.output
    values: dict[str, Any] = {name: flags[name].value for name in _SERVER_FLAGS}
    settings = ServeConfig(**values)
    config = invocation.config()
    from gemma_tune.serving.http.access_control import read_keys
    from gemma_tune.serving.http.server import open_socket

    keys = read_keys(settings.api_key_file) if settings.api_key_file else ()
    bound = open_socket(settings.host, settings.port)
    with bound:
        from gemma_tune.pipeline.serve import start_service
        from gemma_tune.serving.feedback import FeedbackStore
        from gemma_tune.serving.http.app import make_app
        from gemma_tune.serving.http.server import serve

        store = FeedbackStore(settings.feedback_db) if settings.feedback_db else None
        hosts = allowed_hosts(settings, bool(keys))
        service = start_service(config, settings, flags.adapter, output.console)
        try:
            log = _request_log(output) if settings.log_requests else None
            app = make_app(service, settings, keys=keys, hosts=hosts, store=store, log=log)
            address = server_address(settings.host, bound.getsockname()[1], list(service.models), bool(keys))
            serve(app, service.engine, bound, settings.drain_seconds, lambda: announce(address, output))
        finally:
            service.engine.close()
    return address._asdict()


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"`gemma-tune serve` needs {', '.join(missing)}. Run: pip install 'gemma-tune[serve]'")


def _request_log(output: Output) -> Callable[[str], None]:
    return lambda line: output.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)


def _server_flags() -> tuple[Flag, ...]:
    defaults = {field.name: field.default for field in dataclasses.fields(ServeConfig)}
    return tuple(Flag(name, text, defaults[name], group) for name, (group, text) in _SERVER_FLAGS.items())


VERB = Verb(
    name="serve",
    usage="--model=… [--adapter=NAME=PATH …] [--port=8000]",
    description="""Serves a model over HTTP, as OpenAI's API does, to several clients at once, with a chat page. Of a
    run, both the base model and the tuned model can be asked. SIGTERM or Ctrl-C stops the server once the running
    requests are answered.""",
    examples=(
        "gemma-tune serve --model=runs/mine",
        "gemma-tune serve --model=demo --adapter=support=runs/mine --adapter=sales=runs/other --quantize=int8",
        "gemma-tune serve --model=runs/mine --host=0.0.0.0 --api_key_file=keys.txt",
    ),
    flags=(
        *setting_flags("model"),
        Flag(
            "adapter",
            "NAME=PATH of a LoRA adapter, or of a run, that requests may ask for as NAME. May be given several times.",
            group="Model",
            is_repeated=True,
        ),
        *setting_flags(
            "precision", "quantize", "block_size", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty",
        ),
        *_server_flags(),
        *setting_flags("seed"),
    ),
    run=_run,
)  # fmt: skip
