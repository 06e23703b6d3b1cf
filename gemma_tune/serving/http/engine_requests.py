"""Turns HTTP requests into requests to the engine, or into errors that say why they can't be answered."""

import secrets
from collections.abc import Sequence

from gemma_tune.data import Turn
from gemma_tune.serving.engine.request import Request
from gemma_tune.serving.http.api_errors import ApiError
from gemma_tune.serving.http.request_schema import ChatRequest, CompletionRequest, GenerationRequest, Message
from gemma_tune.serving.http.served_models import Service
from gemma_tune.serving.sampling import Sampling

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "model"}


def chat_requests(service: Service, body: ChatRequest, max_answers: int) -> list[Request]:
    """Returns the engine's requests for a conversation: one for each of its `n` answers.

    Raises:
        ApiError: The model doesn't exist, or the conversation is malformed or too long.
    """
    prompt_ids = service.encoder.encode(turns_of(body.messages, service.encoder.template.control_tokens))
    num_logprobs = max(body.top_logprobs or 0, 1) if body.logprobs else 0
    max_tokens = body.max_completion_tokens or body.max_tokens
    return _requests(service, body, [prompt_ids], max_tokens, num_logprobs, max_answers)


def completion_requests(service: Service, body: CompletionRequest, max_answers: int) -> list[Request]:
    """Returns the engine's requests for texts to continue: `n` for each prompt, in the prompts' order.

    A prompt may hold control tokens: clients of this path write turns by hand. `<bos>` is added where it is missing.

    Raises:
        ApiError: The model doesn't exist, or a prompt is malformed or too long.
    """
    prompts = [_prompt_ids(service, prompt) for prompt in _prompts(body)]
    num_logprobs = 0 if body.logprobs is None else max(body.logprobs, 1)
    return _requests(service, body, prompts, body.max_tokens, num_logprobs, max_answers)


def turns_of(messages: Sequence[Message], control_tokens: Sequence[str]) -> tuple[Turn, ...]:
    """Returns a conversation's turns: one system turn of all system messages, if there are any, then user and model.

    Raises:
        ApiError: User and assistant don't alternate, the last message isn't the user's, or a message holds a control
            token, with which a text could pass for another role's turn.
    """
    for index, message in enumerate(messages):
        if found := [token for token in control_tokens if token in message.text]:
            raise _invalid(f"messages[{index}].content", f"a message must not contain the control token {found[0]!r}")
    num_system = next((i for i, m in enumerate(messages) if _ROLES[m.role] != "system"), len(messages))
    system = "\n\n".join(message.text for message in messages[:num_system])
    turns = [Turn("system", system)] if system else []
    for index, message in enumerate(messages[num_system:]):
        expected = "model" if index % 2 else "user"
        if _ROLES[message.role] != expected:
            raise _invalid(
                f"messages[{index + num_system}].role",
                f"{'assistant' if index % 2 else 'user'!r} was expected, got {message.role!r}: after any system "
                "messages, user and assistant must alternate",
            )
        turns.append(Turn(expected, message.text))
    if not turns or turns[-1].role != "user":
        raise _invalid("messages", "the last message must have the role 'user'")
    return tuple(turns)


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
        raise _invalid("prompt", f"token ids must be below {tokenizer.vocabulary_size}, got {largest}")
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
        raise _invalid("n", f"a request may ask for at most {max_answers} answers, got {num_answers * len(prompts)}")
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
        )
        for prompt in prompts
        for index in range(num_answers)
    ]


def _max_new_tokens(service: Service, num_prompt_tokens: int, max_tokens: int | None) -> int:
    """Returns the longest answer: what is asked for, which must fit, or else as much of the default as fits."""
    room = service.max_length - num_prompt_tokens
    if room < max(max_tokens or 1, 1):
        answer = f" and the answer may have {max_tokens:,}" if max_tokens else ""
        raise ApiError(
            400,
            f"The request is too long: the prompt has {num_prompt_tokens:,} tokens{answer}, but prompt and answer "
            f"together may have at most {service.max_length:,}.",
            param="messages" if max_tokens is None else "max_tokens",
            code="context_length_exceeded",
        )
    return max_tokens or min(service.defaults.max_new_tokens, room)


def _sampling(body: GenerationRequest, default: Sampling) -> Sampling:
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if (value := getattr(body, name)) is not None
    }
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return default._replace(**given)


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}.", param=param, code="invalid_value")
