"""Tells users how a server is reached, and decides under which names it answers."""

import ipaddress
import json
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from gemma_tune.cli.output import Output
from gemma_tune.serve_config import ServeConfig


class ServerAddress(NamedTuple):
    """How a running server is reached.

    Attributes:
        url: Address that a browser on this machine opens.
        host: Address that it listens at.
        port: Port that it listens at.
        models: Names of the models that requests may ask for.
        needs_key: Whether requests need an API key.
    """

    url: str
    host: str
    port: int
    models: list[str]
    needs_key: bool


def server_address(host: str, port: int, models: Sequence[str], needs_key: bool) -> ServerAddress:
    """Returns the address of a server, with a URL that works on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    return ServerAddress(url, host, port, list(models), needs_key)


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(settings: ServeConfig, needs_key: bool) -> tuple[str, ...]:
    """Returns the host names that requests may address; none: any."""
    if settings.allowed_hosts or needs_key or not is_loopback(settings.host):
        return settings.allowed_hosts
    own = f"[{settings.host}]" if ":" in settings.host else settings.host
    return ("localhost", "127.0.0.1", "[::1]", own)


def announce(address: ServerAddress, output: Output) -> None:
    """Prints where a server is and how to ask it, and warns where strangers can."""
    url, model = address.url, address.models[0]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
    header = " -H 'Authorization: Bearer KEY'" if address.needs_key else ""
    output.console.print(f"\nServing {', '.join(address.models)}. Ctrl-C stops the server.", markup=False)
    for line in (
        f"  page    {url}/",
        f"  API     {url}/v1   (as OpenAI's), {url}/health, {url}/metrics",
        f"  curl    curl {url}/v1/chat/completions{header} -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        f'  Python  openai.OpenAI(base_url="{url}/v1", api_key="{"KEY" if header else "none"}")'
        f'.chat.completions.create(model="{model}", messages=[…])',
    ):
        output.console.print(line, markup=False, soft_wrap=True)
    if not is_loopback(address.host) and not address.needs_key:
        output.console.print(
            f"\nOther machines can reach {address.host}, and no API key is needed: anyone who can reach it can use the "
            "model. --api_key_file=FILE asks for a key.",
            style="yellow",
            markup=False,
        )
    output.write_result(address._asdict())
