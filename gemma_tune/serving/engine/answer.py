"""The state of one answer, from when its request is queued until its last delta is delivered."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.serving.engine.kv_cache import CacheSlot
from gemma_tune.serving.engine.request import AnswerDelta, Request, TokenLogprob
from gemma_tune.serving.text_stream import TextStream

_UNKNOWN_LOGPROB = -9999.0  # As in OpenAI's API. JSON has no infinity.
Deliver = Callable[[AnswerDelta], None]


class AnswerHandle:
    """What `Engine.submit` returns: a way to cancel the answer, and to wait for its end.

    Attributes:
        done: Event that is set when the last delta has been delivered.
    """

    def __init__(self, wake: Callable[[], None]):
        self._wake, self._cancelled = wake, False
        self.done = threading.Event()

    def cancel(self) -> None:
        """Ends the answer at the next step, with finish_reason `cancelled`. Any thread may call it, at any time."""
        self._cancelled = True
        self._wake()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled


class Answer:
    """An answer that is queued or being generated.

    Attributes:
        request: The request that it answers.
        adapter: Index of the adapter; 0 is the base.
        handle: Handle that the caller of `Engine.submit` has.
        cache_slot: Its slot of the KV cache; None while it is queued.
        seen_row: Its row in the table of seen tokens; -1 while it is queued.
        num_prefilled: Prompt tokens whose keys and values are in the cache.
        num_generated: Tokens of the answer so far.
        last_token: Input of the next decode step: the prompt's last token, then each generated one.
        finish_reason: Why it has ended; "" while it goes on.
        grammar: What the grammar allows next, if the request has one.
    """

    def __init__(
        self, request: Request, adapter: int, deliver: Deliver, handle: AnswerHandle, tokenizer: TextTokenizer
    ):
        self.request, self.adapter, self.handle = request, adapter, handle
        self.cache_slot: CacheSlot | None = None
        self.seen_row, self.num_prefilled, self.num_generated = -1, 0, 0
        self.last_token = request.prompt_ids[-1]
        self.finish_reason = ""
        self.grammar = None if request.constraint is None else request.constraint.begin(request.max_new_tokens)
        self._deliver, self._tokenizer = deliver, tokenizer
        self._stop_ids = frozenset(request.stop_ids)
        self._text = TextStream(tokenizer.decode, request.stop_strings)

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt is in the cache but its last token, which the first decode step reads."""
        return self.num_prefilled == len(self.request.prompt_ids) - 1

    @property
    def position(self) -> int:
        """Position in the cache slot of the token that the next decode step reads."""
        return len(self.request.prompt_ids) - 1 + self.num_generated

    def add_token(self, token: int, logprob: float, top_ids: Sequence[int], top_logprobs: Sequence[float]) -> None:
        """Adds the next token and delivers its delta. The log-probabilities are read only if they were asked for."""
        if self.grammar is not None:
            taken = self.grammar.advance(token)
            if taken is None:
                self.end("length")
                return
            if taken != token:  # Its log-probability is known only if it is among the most likely.
                logprob = dict(zip(top_ids, top_logprobs, strict=True)).get(taken, _UNKNOWN_LOGPROB)
                token = taken
        if token in self._stop_ids:
            self.end("stop")
            return
        self.num_generated += 1
        self.last_token = token
        text = self._text.push(token)
        logprobs: dict[str, Any] = {}
        if count := self.request.num_logprobs:
            most_likely = zip(top_ids[:count], top_logprobs[:count], strict=True)
            logprobs["logprobs"] = (self._token_logprob(token, logprob),)
            logprobs["top_logprobs"] = (tuple(self._token_logprob(*each) for each in most_likely),)
        if self._text.stopped:
            self._finish(AnswerDelta(text, (token,), finish_reason="stop", **logprobs))
        elif self.grammar is not None and self.grammar.is_complete:
            reason = "length" if self.grammar.was_cut_short else "stop"
            self._finish(AnswerDelta(text + self._text.finish(), (token,), finish_reason=reason, **logprobs))
        elif self.num_generated == self.request.max_new_tokens:
            self._finish(AnswerDelta(text + self._text.finish(), (token,), finish_reason="length", **logprobs))
        else:
            self._send(AnswerDelta(text, (token,), **logprobs))

    def end(self, reason: str, error: str = "") -> None:
        """Delivers the last delta."""
        self._finish(AnswerDelta(self._text.finish(), finish_reason=reason, error=error))

    def _finish(self, delta: AnswerDelta) -> None:
        # The text held back until the last token may complete a stop string.
        self.finish_reason = "stop" if self._text.stopped and delta.finish_reason == "length" else delta.finish_reason
        self._send(delta._replace(finish_reason=self.finish_reason))
        self.handle.done.set()

    def _send(self, delta: AnswerDelta) -> None:
        try:
            self._deliver(delta)
        except Exception:  # The receiver is gone; the other answers go on.
            self.handle.cancel()

    def _token_logprob(self, token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(int(token), self._tokenizer.decode([int(token)]), float(logprob))


def stream_deltas(
    submit: Callable[[Request, Deliver], AnswerHandle], request: Request
) -> Generator[AnswerDelta, None, None]:
    """Yields the deltas of one answer as they come. Closing the iterator cancels the answer."""
    deltas: queue.SimpleQueue[AnswerDelta] = queue.SimpleQueue()
    handle = submit(request, deltas.put)
    try:
        while True:
            delta = deltas.get()
            yield delta
            if delta.finish_reason:
                return
    finally:
        handle.cancel()
