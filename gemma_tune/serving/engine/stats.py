"""Counts what an engine has done, and the programs that this process has compiled."""

from typing import NamedTuple

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_num_compilations = 0


def num_compilations() -> int:
    """Returns how many programs have been compiled, or read from disk, since this module was imported."""
    return _num_compilations


def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    global _num_compilations
    _num_compilations += event == _COMPILED


jax.monitoring.register_event_duration_secs_listener(_count)


class EngineStats(NamedTuple):
    """What an engine is doing, and has done since it was made.

    Attributes:
        max_running: Requests that can be answered at once.
        running: Requests that are being answered.
        queued: Requests that wait.
        cache_positions: Size of the KV cache, in token positions.
        cache_positions_in_use: Positions in the slots of running requests.
        finish_reasons: Finish reason -> number of requests.
        prompt_tokens: Tokens of all prompts.
        reused_tokens: Prompt tokens whose keys and values were in the cache already.
        generated_tokens: Tokens of all answers.
        decode_steps: Steps, each of which adds a token to all running answers.
        computing_seconds: Time spent in prefill and decode steps.
        compilations_since_start: Programs compiled in this process since the engine was started.
    """

    max_running: int
    running: int
    queued: int
    cache_positions: int
    cache_positions_in_use: int
    finish_reasons: dict[str, int]
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    decode_steps: int
    computing_seconds: float
    compilations_since_start: int
