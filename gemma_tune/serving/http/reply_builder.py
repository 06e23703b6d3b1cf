"""Builds replies in the form of OpenAI's API from the engine's deltas, whole or as events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, NamedTuple

from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.serving.engine.request import AnswerDelta, Request
from gemma_tune.serving.http.logprobs import chat_logprobs, text_logprobs
from gemma_tune.serving.http.pending_answers import PendingAnswers
from gemma_tune.serving.http.served_models import ServedModel
from gemma_tune.serving.http.streaming import DONE, KEEP_ALIVE, event
from gemma_tune.serving.tools.answer_reader import AnswerReader
from gemma_tune.serving.tools.tool_text import CalledTool


class CompletionKind(NamedTuple):
    """The names that OpenAI's API uses for a kind of reply.

    Attributes:
        prefix: Beginning of its id.
        whole: Object type of a whole reply.
        chunk: Object type of a chunk of a stream.
    """

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
    """Builds one reply.

    Args:
        kind: CHAT or TEXT.
        model: Model that answers.
        requests: Requests to the engine, in the order of the reply's choices.
        num_top: Number of most likely tokens to show at each position; None: no log-probabilities.
        tokenizer: Tokenizer of the model.
        tool_names: Names of the tools that may be called.
    """

    def __init__(
        self,
        kind: CompletionKind,
        model: ServedModel,
        requests: Sequence[Request],
        num_top: int | None,
        tokenizer: TextTokenizer,
        tool_names: Collection[str] = (),
    ):
        self._tool_names = tool_names
        self._kind, self._num_answers, self._num_top, self._tokenizer = kind, len(requests), num_top, tokenizer
        self._head = {
            "id": f"{kind.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.version,
        }
        # A prompt with several answers counts once.
        self._num_prompt_tokens = sum(len(prompt) for prompt in {request.prompt_ids for request in requests})

    async def whole(self, answers: PendingAnswers) -> dict[str, Any]:
        """Waits until all answers are complete, and returns the reply."""
        deltas: list[list[AnswerDelta]] = [[] for _ in range(self._num_answers)]
        async for index, delta in answers:
            if delta is not None:
                deltas[index].append(delta)
        complete = [_joined(each) for each in deltas]
        choices = [self._choice(index, answer) for index, answer in enumerate(complete)]
        usage = self._usage(sum(len(answer.token_ids) for answer in complete))
        return {**self._head, "object": self._kind.whole, "choices": choices, "usage": usage}

    async def events(self, answers: PendingAnswers, with_usage: bool) -> AsyncIterator[bytes]:
        """Yields the reply as events while the answers are generated.

        Args:
            answers: Pending answers to the requests.
            with_usage: Whether the last event has the numbers of tokens.
        """
        unknown = {"usage": None} if with_usage else {}

        def chunk(choice: dict[str, Any]) -> bytes:
            return event({**self._head, "object": self._kind.chunk, "choices": [choice], **unknown})

        if self._kind.is_chat:
            for index in range(self._num_answers):
                first = {"role": "assistant", "content": "", "refusal": None}
                yield chunk({"index": index, "delta": first, "logprobs": None, "finish_reason": None})
        num_generated, offsets = 0, [0] * self._num_answers
        readers = [AnswerReader(self._tool_names) for _ in range(self._num_answers)]
        async for index, delta in answers:
            if delta is None:
                yield KEEP_ALIVE
                continue
            num_generated += len(delta.token_ids)
            if self._tool_names:
                delta, calls = _read(readers[index], delta)
                if calls:
                    called = {"tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]}
                    yield chunk({"index": index, "delta": called, "logprobs": None, "finish_reason": None})
            if delta.text or delta.finish_reason or delta.logprobs:
                yield chunk(self._chunk_choice(index, delta, offsets[index]))
                offsets[index] += sum(len(token.text) for token in delta.logprobs)
        if with_usage:
            head = {**self._head, "object": self._kind.chunk}
            yield event({**head, "choices": [], "usage": self._usage(num_generated)})
        yield DONE

    def _choice(self, index: int, answer: AnswerDelta) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        if self._tool_names:
            answer, calls = _read(AnswerReader(self._tool_names), answer)
        content: dict[str, Any] = {"text": answer.text}
        if self._kind.is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            if calls:
                message |= {"content": answer.text or None, "tool_calls": calls}
            content = {"message": message}
        logprobs = self._logprobs(answer, 0)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _chunk_choice(self, index: int, delta: AnswerDelta, offset: int) -> dict[str, Any]:
        content: dict[str, Any] = {"text": delta.text}
        if self._kind.is_chat:
            content = {"delta": {"content": delta.text} if delta.text else {}}
        logprobs = self._logprobs(delta, offset) if delta.logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": delta.finish_reason or None}

    def _logprobs(self, delta: AnswerDelta, offset: int) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        if self._kind.is_chat:
            return chat_logprobs(delta, self._num_top, self._tokenizer)
        return text_logprobs(delta, self._num_top, offset)

    def _usage(self, num_generated: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
        }


def _read(reader: AnswerReader, delta: AnswerDelta) -> tuple[AnswerDelta, list[dict[str, Any]]]:
    """Returns a delta with the text for the user alone, and the tool calls, which come with the last delta."""
    text = reader.push(delta.text)
    if not delta.finish_reason:
        return delta._replace(text=text), []
    end = reader.finish()
    reason = "tool_calls" if end.calls and delta.finish_reason == "stop" else delta.finish_reason
    return delta._replace(text=text + end.text, finish_reason=reason), [_call_body(call) for call in end.calls]


def _call_body(call: CalledTool) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _joined(deltas: Sequence[AnswerDelta]) -> AnswerDelta:
    """Returns a complete answer as one delta."""
    return AnswerDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(token for delta in deltas for token in delta.logprobs),
        top_logprobs=tuple(top for delta in deltas for top in delta.top_logprobs),
        finish_reason=deltas[-1].finish_reason,
    )
