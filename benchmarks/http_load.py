"""Many clients of a server at once, of whom some leave midway and some send nonsense: what `serving_load` measures."""

import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from typing import Any, NamedTuple

from benchmarks.server import Server

_SHARE_LEAVING, _SHARE_MALFORMED = 0.05, 0.05
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
