"""What an engine has done, and how many programs this process has compiled."""

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
    """What the engine is doing, and has done since it was made.

    slots, slots_in_use: Requests that can be, and are being, answered at once. queued: Requests that wait.
    positions, positions_in_use: Of the cache. requests: Finish reason -> how many. prompt_tokens: Asked with.
    reused_tokens: Of these, those whose keys and values were there already. generated_tokens: Made. steps: Of all
    answers under way together. seconds_computing: In steps and prompts. compilations_since_start: In this process.
    """

    slots: int
    running: int
    queued: int
    positions: int
    positions_in_use: int
    requests: dict[str, int]
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    steps: int
    seconds_computing: float
    compilations_since_start: int
