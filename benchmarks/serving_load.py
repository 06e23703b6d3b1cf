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
import random
import re
import statistics
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.server import Server

_MODEL = flags.DEFINE_string("model", "tiny", "The model that is served.")
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 1000, "Requests in all.", lower_bound=20)
_NUM_CLIENTS = flags.DEFINE_integer("num_clients", 32, "Clients that ask at once.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 24, "Longest answer.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of what each request is.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object last.")
_SHARE_LEAVING, _SHARE_MALFORMED, _MEMORY_GROWTH = 0.05, 0.05, 0.05
_TOPICS = ("camera", "battery", "screen", "sound", "account", "network", "keyboard", "storage", "update", "warranty")
_CHAT = "/v1/chat/completions"
_LONG_BODY = b'{"model": "' + b"x" * 1_100_000 + b'"}'


class Outcome(NamedTuple):
    """What became of a request. kind: `answered`, `left` or `malformed`."""

    kind: str
    is_right: bool
    status: int
    seconds: float
    first_token_seconds: float = 0.0
    num_tokens: int = 0


def bodies(model: str, max_tokens: int) -> list[dict[str, Any]]:
    """Returns well-formed bodies of several lengths, whose answers are greedy."""
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": f"{'Tell me more. ' * (index % 7)}What about the {topic}?"}],
            "max_tokens": max(max_tokens - index % 9, 1),
            "temperature": 0,
            "stream": index % 2 == 0,
        }
        for index, topic in enumerate(_TOPICS * 4)
    ]


def malformed(model: str, rng: random.Random) -> bytes:
    """Returns a body that must be refused."""
    return rng.choice(
        [
            b"{",
            b"\xff\x00",
            b"[" * 5000,
            json.dumps({"model": model}).encode(),
            json.dumps({"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}).encode(),
            json.dumps({"model": model, "messages": [{"role": "user", "content": 5}]}).encode(),
            json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}], "temperature": -1}).encode(),
            json.dumps({"model": model, "messages": [{"role": "user", "content": "word " * 20_000}]}).encode(),
            _LONG_BODY,
        ]
    )


async def ask(client: Any, body: dict[str, Any], leaves: bool) -> tuple[str, Outcome]:
    """Sends a well-formed request, and leaves after its first piece if it is to. Returns the answer and the outcome."""
    started = time.perf_counter()
    first, text, num_tokens = 0.0, "", 0
    async with client.stream("POST", _CHAT, json={**body, "stream": body["stream"] or leaves}) as reply:
        if not (body["stream"] or leaves):
            whole = json.loads(await reply.aread())
            text = whole["choices"][0]["message"]["content"] if reply.status_code == 200 else ""
            num_tokens = whole["usage"]["completion_tokens"] if reply.status_code == 200 else 0
        else:
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                piece = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                first = first or (time.perf_counter() - started if piece else 0.0)
                text += piece
                if leaves and piece:
                    break
    seconds = time.perf_counter() - started
    kind = "left" if leaves else "answered"
    return text, Outcome(kind, reply.status_code == 200, reply.status_code, seconds, first, num_tokens)


async def ask_wrongly(client: Any, body: bytes) -> Outcome:
    """Sends a malformed request."""
    started = time.perf_counter()
    reply = await client.post(_CHAT, content=body, headers={"content-type": "application/json"})
    is_right = reply.status_code in (400, 404, 413) and set(reply.json()) == {"error"}
    return Outcome("malformed", is_right, reply.status_code, time.perf_counter() - started)


async def load(server: Server, num_requests: int, num_clients: int, max_tokens: int, seed: int) -> dict[str, Any]:
    """Returns what became of the requests, and what the server holds."""
    import httpx2

    rng, questions = random.Random(seed), bodies(server.model, max_tokens)
    limits = httpx2.Limits(max_connections=num_clients)
    outcomes: list[Outcome] = []
    memory: list[int] = []
    async with httpx2.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        alone = [(await ask(client, body, leaves=False))[0] for body in questions]
        plan = iter([(rng.random(), rng.randrange(len(questions))) for _ in range(num_requests)])
        started = time.perf_counter()

        async def one_client() -> None:
            for chance, index in plan:
                if chance < _SHARE_MALFORMED:
                    outcomes.append(await ask_wrongly(client, malformed(server.model, rng)))
                else:
                    leaves = chance < _SHARE_MALFORMED + _SHARE_LEAVING
                    text, outcome = await ask(client, questions[index], leaves)
                    is_same = alone[index].startswith(text) if leaves else text == alone[index]
                    outcomes.append(outcome._replace(is_right=outcome.is_right and is_same))
                if len(outcomes) % max(num_requests // 20, 1) == 0:
                    memory.append(server.memory_bytes)

        await asyncio.gather(*(one_client() for _ in range(num_clients)))
        seconds = time.perf_counter() - started
        left_over = await _idle(client)
    return {**_figures(outcomes, seconds), **left_over, "memory_bytes": memory, "num_clients": num_clients}


async def _idle(client: Any) -> dict[str, Any]:
    """Waits until the server has noticed that all clients are gone, and returns what it still holds."""
    for _ in range(100):
        health = (await client.get("/health")).json()
        if health["running"] == health["queued"] == 0:
            break
        await asyncio.sleep(0.05)
    (compilations,) = re.findall(
        r"^gemma_tune_compilations_since_start (\S+)", (await client.get("/metrics")).text, re.M
    )
    return {"slots_left": health["running"], "queued_left": health["queued"], "compilations": float(compilations)}


def _figures(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    answered = [each for each in outcomes if each.kind == "answered"]
    first = sorted(each.first_token_seconds for each in answered if each.first_token_seconds)
    whole = sorted(each.seconds for each in answered)
    return {
        "num_requests": len(outcomes),
        "kinds": dict(Counter(each.kind for each in outcomes)),
        "wrong": [each._asdict() for each in outcomes if not each.is_right],
        "seconds": seconds,
        "requests_per_second": len(outcomes) / seconds,
        "median_seconds": statistics.median(whole),
        "p99_seconds": whole[int(0.99 * (len(whole) - 1))],
        "median_first_token_seconds": statistics.median(first) if first else 0.0,
    }


def shortfalls(figures: dict[str, Any]) -> list[str]:
    """Returns what a server must do and this one didn't."""
    found = [f"{each['kind']}: status {each['status']}, or another answer than alone" for each in figures["wrong"]]
    if figures["slots_left"] or figures["queued_left"]:
        found.append(f"{figures['slots_left']} slots are taken and {figures['queued_left']} requests wait at the end")
    if figures["compilations"]:
        found.append(f"{figures['compilations']:.0f} programs were compiled after the start")
    memory = figures["memory_bytes"]
    settled = max(memory[: max(len(memory) // 4, 1)])
    if max(memory) > settled * (1 + _MEMORY_GROWTH):
        found.append(f"memory grew from {settled / 1e6:,.0f} to {max(memory) / 1e6:,.0f} MB")
    return found


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
