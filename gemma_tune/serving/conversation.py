"""A conversation with one person: an engine for one answer at a time, in which each turn finds the last one's keys and
values.
"""

from collections.abc import Iterator, Sequence

from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.engine.engine import Engine
from gemma_tune.serving.engine.request import Request
from gemma_tune.serving.generation import encode_prompt, stop_ids
from gemma_tune.serving.sampling import Sampling


class Conversation:
    """Answers the last of some turns.

    Args:
        model: From `load_model`, on one device.
        max_length: Longest conversation, answer included, in tokens.
        max_new_tokens: Longest answer.
        sampling: How tokens are picked.
    """

    def __init__(self, model: keras.Model, max_length: int, max_new_tokens: int, sampling: Sampling):
        if max_new_tokens >= max_length:
            raise ConfigError(f"generation.max_new_tokens must be below {max_length} in a chat, got {max_new_tokens}.")
        self._model, self._max_new_tokens, self._sampling = model, max_new_tokens, sampling
        # Room for two: the answer under way, and what the one before it has left.
        self._engine = Engine(
            model, max_concurrent=1, max_tokens_in_flight=2 * max_length, max_length=max_length, max_queued=1
        )
        self._engine.start()

    def trim(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns the turns without so many of the earliest, a system turn apart, as make the conversation too long."""
        kept = list(turns)
        first = int(kept[0].role == "system")
        while len(self._prompt(kept)) + self._max_new_tokens > self._engine.max_length and len(kept) > first + 1:
            del kept[first : first + 2]
        return kept

    def answer(self, turns: Sequence[Turn], seed: int) -> Iterator[str]:
        """Yields the answer in pieces, without white space around it. Leaving the iterator ends the answer.

        Raises:
            ConfigError: The last turn alone is too long.
        """
        stops = stop_ids(self._model, self._engine.tokenizer)
        request = Request(tuple(self._prompt(turns)), self._max_new_tokens, self._sampling, seed, stops)
        blank, is_first = "", True
        for piece in self._engine.stream(request):
            text = blank + piece.text
            text = text.lstrip() if is_first else text
            ready = text.rstrip()
            blank = text[len(ready) :]
            if ready:
                is_first = False
                yield ready

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        return encode_prompt(self._model, self._engine.tokenizer, turns)
