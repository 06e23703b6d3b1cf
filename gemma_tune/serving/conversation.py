"""Answers one person's conversation turn by turn, reusing the KV cache of the turns before."""

import contextlib
from collections.abc import Iterator, Sequence

from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.engine.engine import Engine
from gemma_tune.serving.engine.request import Request
from gemma_tune.serving.prompt_encoder import prompt_encoder_of
from gemma_tune.serving.sampling import Sampling
from gemma_tune.serving.text_stream import without_outer_space


class Conversation:
    """An engine for one answer at a time, in which each turn finds the keys and values of the turns before.

    Args:
        model: Model from `load_model`, on one device.
        max_length: Longest conversation with its answer, in tokens.
        max_new_tokens: Longest answer, in tokens.
        sampling: Sampling settings.

    Raises:
        ConfigError: An answer may be as long as the whole conversation.
    """

    def __init__(self, model: keras.Model, max_length: int, max_new_tokens: int, sampling: Sampling):
        if max_new_tokens >= max_length:
            raise ConfigError(f"generation.max_new_tokens must be below {max_length} in a chat, got {max_new_tokens}.")
        self._encoder, self._max_new_tokens, self._sampling = prompt_encoder_of(model), max_new_tokens, sampling
        # Room for two: the answer being generated, and what the one before it has left in the cache.
        self._engine = Engine(
            model, max_concurrent=1, max_tokens_in_flight=2 * max_length, max_length=max_length, max_queued=1
        )
        self._engine.start()

    def trim(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns the turns without as many of the earliest as make the conversation too long. A system turn stays."""
        kept = list(turns)
        first = int(kept[0].role == "system")
        while (
            len(self._encoder.encode(kept)) + self._max_new_tokens > self._engine.max_length and len(kept) > first + 1
        ):
            del kept[first : first + 2]
        return kept

    def answer(self, turns: Sequence[Turn], seed: int) -> Iterator[str]:
        """Yields the answer to the last turn part by part, without white space around it.

        Closing the iterator cancels the answer.

        Raises:
            ConfigError: The last turn alone is too long.
        """
        prompt_ids = tuple(self._encoder.encode(turns))
        request = Request(prompt_ids, self._max_new_tokens, self._sampling, seed, self._encoder.stop_ids)
        with contextlib.closing(self._engine.stream(request)) as deltas:
            yield from without_outer_space(delta.text for delta in deltas)

    def close(self) -> None:
        """Stops the engine."""
        self._engine.close()
