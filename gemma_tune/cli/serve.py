"""`gemma-tune serve`."""

import dataclasses
import importlib.util
import ipaddress
import json
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags as absl_flags

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.errors import ConfigError
from gemma_tune.serve_config import ServeConfig

USAGE = "--model=… [--adapter=NAME=PATH …] [--port=8000]"
DESCRIPTION = """Answers over HTTP as OpenAI's API does, for several clients at once, and shows a page to chat on.
Of a run, both its base and its tuned model can be asked. SIGTERM or Ctrl-C ends it when what is under way is
answered."""
EXAMPLES = (
    "gemma-tune serve --model=runs/mine",
    "gemma-tune serve --model=demo --adapter=support=runs/mine --adapter=sales=runs/other --quantize=int8",
    "gemma-tune serve --model=runs/mine --host=0.0.0.0 --api_key_file=keys.txt",
)
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_MODEL_FLAGS = (
    "model", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "precision", "quantize",
    "block_size", "seed",
)  # fmt: skip
# What each means stands at ServeConfig; here is what fits on a line.
_HELP = {
    "host": "Address to listen at; 0.0.0.0: all of this machine's.",
    "port": "Port to listen at; 0: a free one.",
    "name": "The model's name in requests; if not given, the last part of --model.",
    "max_concurrent": "Answers that are written at once.",
    "max_tokens_in_flight": "Size of the key/value cache: tokens of prompts and longest answers of all at once.",
    "max_length": "Longest prompt and answer together, in tokens.",
    "max_queued": "Answers that may wait; beyond that, requests get 429.",
    "max_answers": "Largest n of a request.",
    "max_body_bytes": "Longest body of a request.",
    "request_timeout_seconds": "Longest time for a request.",
    "drain_seconds": "After SIGTERM, how long requests under way may take to end.",
    "api_key_file": "File of keys, one a line, of which a request must bring one as Authorization: Bearer KEY.",
    "allowed_hosts": "Names by which the server may be addressed, with commas between.",
    "cors_origins": "Web pages of other servers that may ask from a browser, with commas between.",
    "feedback_db": "SQLite file for what users say of answers; empty: none.",
    "log_requests": "Print a line for each request.",
}


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define(values, *_MODEL_FLAGS)
    absl_flags.DEFINE_multi_string(
        "adapter", [], "NAME=PATH of a LoRA adapter, or of a run with one, to ask for by NAME",
        flag_values=values,
    )  # fmt: skip
    for field in dataclasses.fields(ServeConfig):
        flags.define_setting(values, field.name, field.default, _HELP[field.name])


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Serves until a signal ends it."""
    del positional
    _check_packages()
    settings = ServeConfig(**{name: value for name in _HELP if (value := values[name].value) is not None})
    config = flags.to_config(values, overrides)
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
        hosts = _allowed_hosts(settings, bool(keys))
        service = start_service(config, settings, values["adapter"].value or [], output.console)
        try:
            log = _request_log(output) if settings.log_requests else None
            app = make_app(service, settings, keys=keys, hosts=hosts, store=store, log=log)
            about = _about(settings.host, bound.getsockname()[1], list(service.models), bool(keys))
            serve(
                app,
                service.engine,
                bound,
                settings.drain_seconds,
                lambda: _say(output, about, _is_loopback(settings.host)),
            )
        finally:
            service.engine.close()
    return about


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"`gemma-tune serve` needs {', '.join(missing)}. Run: pip install 'gemma-tune[serve]'")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _allowed_hosts(settings: ServeConfig, has_keys: bool) -> tuple[str, ...]:
    """Returns the names by which the server may be addressed; none: by any."""
    if settings.allowed_hosts or has_keys or not _is_loopback(settings.host):
        return settings.allowed_hosts
    own = f"[{settings.host}]" if ":" in settings.host else settings.host
    return ("localhost", "127.0.0.1", "[::1]", own)


def _about(host: str, port: int, models: Sequence[str], has_keys: bool) -> dict[str, Any]:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    return {"url": url, "host": host, "port": port, "models": list(models), "needs_key": has_keys}


def _say(output: Output, about: dict[str, Any], is_local: bool) -> None:
    """Prints where the server is and how it is asked."""
    url, model = about["url"], about["models"][0]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
    key = " -H 'Authorization: Bearer KEY'" if about["needs_key"] else ""
    output.console.print(f"\nServing {', '.join(about['models'])}. Ctrl-C ends it.", markup=False)
    for line in (
        f"  page    {url}/",
        f"  API     {url}/v1   (OpenAI's), {url}/health, {url}/metrics",
        f"  curl    curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        f'  Python  openai.OpenAI(base_url="{url}/v1", api_key="{"KEY" if key else "none"}")'
        f'.chat.completions.create(model="{model}", messages=[…])',
    ):
        output.console.print(line, markup=False, soft_wrap=True)
    if not is_local and not about["needs_key"]:
        output.console.print(
            f"\n{about['host']} can be reached from other machines, and no key is needed: whoever reaches it may ask. "
            "--api_key_file=FILE asks for one.",
            style="yellow",
            markup=False,
        )
    output.result(about)


def _request_log(output: Output) -> Callable[[str], None]:
    return lambda line: output.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)
