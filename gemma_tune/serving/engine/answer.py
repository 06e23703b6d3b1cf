"""One request under way: what was asked, how far its answer is, and what goes to the one who asked."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.serving.engine.kv_cache import CacheSlot
from gemma_tune.serving.engine.request import AnswerDelta, Request, TokenLogprob
from gemma_tune.serving.text_stream import TextStream

Deliver = Callable[[AnswerDelta], None]


class AnswerHandle:
    """What `Engine.submit` returns.

    Attributes:
        done: Set when the last piece has been delivered.
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
    """A request from when it waits until its last piece.

    Attributes:
        adapter: Index of the adapter.
        slot, region: Where it is computed, once it is.
        num_read: Tokens of the prompt whose keys and values are in the cache.
        num_made: Tokens of the answer.
        last_token: What the next step reads: the prompt's last token, then each one made.
        finish_reason: "" until it is done.
    """

    def __init__(
        self, request: Request, adapter: int, deliver: Deliver, handle: AnswerHandle, tokenizer: TextTokenizer
    ):
        self.request, self.adapter, self.handle = request, adapter, handle
        self.slot, self.num_read, self.num_made = -1, 0, 0
        self.region: CacheSlot | None = None
        self.last_token = request.prompt_ids[-1]
        self.finish_reason = ""
        self._deliver, self._tokenizer = deliver, tokenizer
        self._stop_ids = frozenset(request.stop_ids)
        self._text = TextStream(tokenizer.decode, request.stop_strings)

    @property
    def is_read(self) -> bool:
        """Whether all of the prompt is in the cache but its last token, which the first step reads."""
        return self.num_read == len(self.request.prompt_ids) - 1

    @property
    def position(self) -> int:
        """Of the token that the next step reads, in the region."""
        return len(self.request.prompt_ids) - 1 + self.num_made

    def take(self, token: int, chosen: float, top_ids: Sequence[int], top: Sequence[float]) -> None:
        """Takes the next token of the answer, and delivers what is known of the text. The log-probabilities are read
        only if they were asked for.
        """
        if token in self._stop_ids:
            self.end("stop")
            return
        self.num_made += 1
        self.last_token = token
        text = self._text.push(token)
        named: dict[str, Any] = {}
        if count := self.request.num_logprobs:
            likeliest = zip(top_ids[:count], top[:count], strict=True)
            named["logprobs"] = (self._logprob(token, chosen),)
            named["top_logprobs"] = (tuple(self._logprob(*each) for each in likeliest),)
        if self._text.stopped:
            self._finish(AnswerDelta(text, (token,), finish_reason="stop", **named))
        elif self.num_made == self.request.max_new_tokens:
            self._finish(AnswerDelta(text + self._text.finish(), (token,), finish_reason="length", **named))
        else:
            self._send(AnswerDelta(text, (token,), **named))

    def end(self, reason: str, error: str = "") -> None:
        """Delivers the last piece."""
        self._finish(AnswerDelta(self._text.finish(), finish_reason=reason, error=error))

    def _finish(self, piece: AnswerDelta) -> None:
        self.finish_reason = "stop" if self._text.stopped and piece.finish_reason == "length" else piece.finish_reason
        self._send(piece._replace(finish_reason=self.finish_reason))
        self.handle.done.set()

    def _send(self, piece: AnswerDelta) -> None:
        try:
            self._deliver(piece)
        except Exception:  # Whoever asked is gone; the others' answers go on.
            self.handle.cancel()

    def _logprob(self, token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(int(token), self._tokenizer.decode([int(token)]), float(logprob))


def stream_deltas(submit: Callable[[Request, Deliver], AnswerHandle], request: Request) -> Iterator[AnswerDelta]:
    """Yields the pieces of one answer as they come. Leaving the iterator cancels it."""
    pieces: queue.SimpleQueue[AnswerDelta] = queue.SimpleQueue()
    handle = submit(request, pieces.put)
    try:
        while True:
            piece = pieces.get()
            yield piece
            if piece.finish_reason:
                return
    finally:
        handle.cancel()
