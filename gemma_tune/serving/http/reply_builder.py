"""From the engine's pieces to replies as OpenAI's API writes them, whole or as events."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.serving.engine.request import AnswerDelta, Request
from gemma_tune.serving.http.logprobs import chat_logprobs, text_logprobs
from gemma_tune.serving.http.pending_answers import PendingAnswers
from gemma_tune.serving.http.served_models import ServedModel
from gemma_tune.serving.http.streaming import DONE, KEEP_ALIVE, event


class CompletionKind(NamedTuple):
    """What a kind of reply is called: at the beginning of its id, whole, and in pieces."""

    prefix: str
    whole: str
    chunk: str

    @property
    def is_chat(self) -> bool:
        """Whether its choices are messages."""
        return self is CHAT


CHAT = CompletionKind("chatcmpl", "chat.completion", "chat.completion.chunk")
TEXT = CompletionKind("cmpl", "text_completion", "text_completion")


class ReplyBuilder:
    """A reply that is being made.

    Args:
        kind: CHAT or TEXT.
        model: That answers.
        requests: Of the engine, in the order of the choices.
        num_top: Likeliest tokens to show at each place; None: no log-probabilities.
        tokenizer: Of the model.
    """

    def __init__(
        self,
        kind: CompletionKind,
        model: ServedModel,
        requests: Sequence[Request],
        num_top: int | None,
        tokenizer: TextTokenizer,
    ):
        self._kind, self._num_answers, self._num_top, self._tokenizer = kind, len(requests), num_top, tokenizer
        self._head = {
            "id": f"{kind.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.version,
        }
        # Answers to one prompt count it once.
        self._num_prompt_tokens = sum(len(prompt) for prompt in {request.prompt_ids for request in requests})

    async def whole(self, answers: PendingAnswers) -> dict[str, Any]:
        """Waits for all answers, and returns the reply."""
        pieces: list[list[AnswerDelta]] = [[] for _ in range(self._num_answers)]
        async for index, piece in answers:
            if piece is not None:
                pieces[index].append(piece)
        texts = [_joined(each) for each in pieces]
        choices = [self._choice(index, piece) for index, piece in enumerate(texts)]
        usage = self._usage(sum(len(piece.token_ids) for piece in texts))
        return {**self._head, "object": self._kind.whole, "choices": choices, "usage": usage}

    async def events(self, answers: PendingAnswers, with_usage: bool) -> AsyncIterator[bytes]:
        """Yields the reply in events, as the answers are made. with_usage: The last says how many tokens it took."""
        unknown = {"usage": None} if with_usage else {}

        def chunk(choice: dict[str, Any]) -> bytes:
            return event({**self._head, "object": self._kind.chunk, "choices": [choice], **unknown})

        if self._kind.is_chat:
            for index in range(self._num_answers):
                delta = {"role": "assistant", "content": "", "refusal": None}
                yield chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        num_generated, offsets = 0, [0] * self._num_answers
        async for index, piece in answers:
            if piece is None:
                yield KEEP_ALIVE
                continue
            num_generated += len(piece.token_ids)
            if piece.text or piece.finish_reason or piece.logprobs:
                yield chunk(self._part(index, piece, offsets[index]))
                offsets[index] += sum(len(token.text) for token in piece.logprobs)
        if with_usage:
            head = {**self._head, "object": self._kind.chunk}
            yield event({**head, "choices": [], "usage": self._usage(num_generated)})
        yield DONE

    def _choice(self, index: int, piece: AnswerDelta) -> dict[str, Any]:
        content: dict[str, Any] = {"text": piece.text}
        if self._kind.is_chat:
            content = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
        return {"index": index, **content, "logprobs": self._logprobs(piece, 0), "finish_reason": piece.finish_reason}

    def _part(self, index: int, piece: AnswerDelta, offset: int) -> dict[str, Any]:
        content: dict[str, Any] = {"text": piece.text}
        if self._kind.is_chat:
            content = {"delta": {"content": piece.text} if piece.text else {}}
        logprobs = self._logprobs(piece, offset) if piece.logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason or None}

    def _logprobs(self, piece: AnswerDelta, offset: int) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        if self._kind.is_chat:
            return chat_logprobs(piece, self._num_top, self._tokenizer)
        return text_logprobs(piece, self._num_top, offset)

    def _usage(self, num_generated: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
        }


def _joined(pieces: Sequence[AnswerDelta]) -> AnswerDelta:
    """Returns an answer as one piece."""
    return AnswerDelta(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(token for piece in pieces for token in piece.logprobs),
        top_logprobs=tuple(top for piece in pieces for top in piece.top_logprobs),
        finish_reason=pieces[-1].finish_reason,
    )
