"""Turns HTTP requests into requests to the engine, or into errors that say why they can't be answered."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemma_tune.errors import ConfigError
from gemma_tune.serving.engine.request import Request
from gemma_tune.serving.grammar.constraints import TokenConstraint
from gemma_tune.serving.http.api_errors import ApiError, invalid
from gemma_tune.serving.http.chat_turns import turns_of
from gemma_tune.serving.http.schema.request_schema import (
    AS_MUCH_AS_FITS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from gemma_tune.serving.http.schema.tool_schema import JsonObjectFormat, JsonSchemaFormat, NamedChoice
from gemma_tune.serving.http.served_models import Service
from gemma_tune.serving.logit_changes import LogitChanges
from gemma_tune.serving.sampling import Sampling
from gemma_tune.serving.tools.call_rules import answer_rules
from gemma_tune.serving.tools.tool_text import Tool


class AnswerFormat(NamedTuple):
    """The form of the answers to a conversation.

    Attributes:
        tools: Tools that may be called.
        constraint: Grammar that answers follow, or None.
    """

    tools: tuple[Tool, ...]
    constraint: TokenConstraint | None


def chat_requests(service: Service, body: ChatRequest, max_answers: int) -> list[Request]:
    """Returns the engine's requests for a conversation: one for each of its `n` answers.

    Raises:
        ApiError: The model doesn't exist, or the conversation is malformed or too long.
    """
    form = answer_format(service, body)
    prompt_ids = service.encoder.encode(turns_of(body.messages, service.encoder.template.control_tokens, form.tools))
    num_logprobs = max(body.top_logprobs or 0, 1) if body.logprobs else 0
    max_tokens = body.max_completion_tokens or body.max_tokens
    requests = _requests(service, body, [prompt_ids], max_tokens, num_logprobs, max_answers)
    return [request._replace(constraint=form.constraint) for request in requests]


def completion_requests(service: Service, body: CompletionRequest, max_answers: int) -> list[Request]:
    """Returns the engine's requests for texts to continue: `n` for each prompt, in the prompts' order.

    A prompt may hold control tokens: clients of this path write turns by hand. `<bos>` is added where it is missing.

    Raises:
        ApiError: The model doesn't exist, or a prompt is malformed or too long.
    """
    prompts = [_prompt_ids(service, prompt) for prompt in _prompts(body)]
    num_logprobs = 0 if body.logprobs is None else max(body.logprobs, 1)
    return _requests(service, body, prompts, body.max_tokens, num_logprobs, max_answers)


def answer_format(service: Service, body: ChatRequest) -> AnswerFormat:
    """Returns which tools a conversation offers, and which form its answers must have.

    Raises:
        ApiError: `tool_choice` asks for a tool that there isn't, or a schema is wrong or isn't supported.
    """
    tools = [
        Tool(each.function.name, each.function.description or "", each.function.parameters)
        for each in body.offered_tools
    ]
    choice, schema, called = body.tool_choice or "auto", _schema_of(body), tools
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        called = [tool for tool in tools if tool.name == name]
        if not called:
            raise invalid("tool_choice.function.name", f"there is no tool {name!r} in `tools`")
    if choice == "required" and not tools:
        raise invalid("tool_choice", "'required' needs `tools`")
    must_call = choice not in ("auto", "none")
    if not must_call and schema is None:
        return AnswerFormat(tuple(tools), None)
    rules = answer_rules(called, None if must_call else schema)
    try:
        return AnswerFormat(tuple(tools), service.encoder.grammars.of_rules(rules))
    except ConfigError as error:
        place = "tools" if must_call else "response_format"
        raise ApiError(400, f"{place}: {error}", param=place, code="invalid_value") from None


def _schema_of(body: ChatRequest) -> Mapping[str, Any] | None:
    """Returns the JSON schema of answers without a call; None: they are text."""
    if isinstance(body.response_format, JsonSchemaFormat):
        return body.response_format.json_schema.json_schema
    return {"type": "object"} if isinstance(body.response_format, JsonObjectFormat) else None


def _prompts(body: CompletionRequest) -> Sequence[str | Sequence[int]]:
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _prompt_ids(service: Service, prompt: str | Sequence[int]) -> list[int]:
    tokenizer = service.encoder.tokenizer
    if isinstance(prompt, str):
        return service.encoder.encode_text(prompt)
    if (largest := max(prompt)) >= tokenizer.vocabulary_size:
        raise invalid("prompt", f"token ids must be below {tokenizer.vocabulary_size}, got {largest}")
    return list(prompt) if prompt[0] == tokenizer.bos_id else [tokenizer.bos_id, *prompt]


def _requests(
    service: Service,
    body: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    num_logprobs: int,
    max_answers: int,
) -> list[Request]:
    model, num_answers = service.model(body.model), body.n or 1
    if num_answers * len(prompts) > max_answers:
        raise invalid("n", f"a request may ask for at most {max_answers} answers, got {num_answers * len(prompts)}")
    seed = secrets.randbits(31) if body.seed is None else body.seed % 2**32
    return [
        Request(
            prompt_ids=tuple(prompt),
            max_new_tokens=_max_new_tokens(service, len(prompt), max_tokens),
            sampling=_sampling(body, service.defaults.sampling),
            seed=(seed + index) % 2**32,
            stop_ids=service.encoder.stop_ids,
            stop_strings=body.stop_strings,
            adapter=model.adapter,
            num_logprobs=num_logprobs,
            changes=_changes(service, body),
        )
        for prompt in prompts
        for index in range(num_answers)
    ]


def _max_new_tokens(service: Service, num_prompt_tokens: int, max_tokens: int | None) -> int:
    """Returns the longest answer: what is asked for, or else the default, as far as there is room."""
    room = service.max_length - num_prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"The request is too long: the prompt has {num_prompt_tokens:,} tokens, but prompt and answer together may "
            f"have at most {service.max_length:,}.",
            param="messages",
            code="context_length_exceeded",
        )
    if max_tokens == AS_MUCH_AS_FITS:
        return room
    return min(max_tokens or service.defaults.max_new_tokens, room)


def _changes(service: Service, body: GenerationRequest) -> LogitChanges:
    given, size = body.logit_bias or {}, service.encoder.tokenizer.vocabulary_size
    outside = [key for key in given if not (key.isdecimal() and len(key) < 10 and int(key) < size)]
    if outside:
        raise invalid("logit_bias", f"its names must be token ids below {size}, got {outside[0][:100]!r}")
    bias = tuple((int(token), value) for token, value in given.items() if value)
    return LogitChanges(body.presence_penalty or 0.0, body.frequency_penalty or 0.0, bias)


def _sampling(body: GenerationRequest, default: Sampling) -> Sampling:
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if (value := getattr(body, name)) is not None
    }
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return default._replace(**given)
