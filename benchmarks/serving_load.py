"""A server under load, over HTTP: many clients at once, of whom some leave midway and some send nonsense.

    python -m benchmarks.serving_load [--model=tiny] [--num_requests=1000] [--num_clients=32] [--json]

Starts `gemma-tune serve` as a process of its own, asks every question once alone, and then all clients ask at once. Of
the requests 5 % are cut off after their first piece, and 5 % are malformed. Must: each answer is the one that the same
question got alone; each malformed request gets 400, 404 or 413; at the end no slot is taken, nothing waits and
nothing was compiled; memory has not grown by more than 5 % since a quarter of the requests were done.
"""

import asyncio
import json
import logging
import sys

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.http_load import load
from benchmarks.machine import describe
from benchmarks.server import Server, shortfalls

_MODEL = flags.DEFINE_string("model", "tiny", "The model that is served.")
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 1000, "Requests in all.", lower_bound=20)
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", 32, "Clients that ask at once.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 24, "Longest answer.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of what each request is.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")


def main(arguments: list[str]) -> None:
    """Prints the table; exits with 1 when something falls short."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # A line for each request.
    arguments = [f"--max_queued={_NUM_CLIENTS.value}", "--max_length=512", "--feedback_db="]
    with Server(_MODEL.value, *arguments) as server:
        figures = asyncio.run(load(server, _NUM_REQUESTS.value, _NUM_CLIENTS.value, _MAX_TOKENS.value, _SEED.value))
    wrong, memory = shortfalls(figures), figures["memory_bytes"]
    table = Table(title=f"{_MODEL.value}, {figures['num_clients']} clients; {describe()['machine']}", show_header=False)
    for name, value in (
        ("requests", f"{figures['num_requests']:,}: {figures['kinds']}"),
        ("not as they must be", str(len(figures["wrong"]))),
        ("requests a second", f"{figures['requests_per_second']:.1f}"),
        ("median, 99th percentile of an answer", f"{figures['median_seconds']:.2f} s, {figures['p99_seconds']:.2f} s"),
        ("median until the first token", f"{figures['median_first_token_seconds']:.2f} s"),
        ("slots taken, requests waiting at the end", f"{figures['slots_left']}, {figures['queued_left']}"),
        ("memory, first and last", f"{memory[0] / 1e6:,.0f} MB, {memory[-1] / 1e6:,.0f} MB"),
    ):
        table.add_row(name, value)
    Console(stderr=_JSON.value).print(table)
    for each in wrong:
        print(f"MISSED: {each}", file=sys.stderr)
    if _JSON.value:
        print(json.dumps({**figures, "missed": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    app.run(main)
