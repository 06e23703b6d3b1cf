"""From what is asked over HTTP to requests of the engine, or to an error that says what can't be answered."""

import secrets
from collections.abc import Sequence

from gemma_tune.data import Turn
from gemma_tune.serving.engine.request import Request
from gemma_tune.serving.http.api_errors import ApiError
from gemma_tune.serving.http.request_schema import ChatRequest, CompletionRequest, GenerationRequest, Message
from gemma_tune.serving.http.served_models import Service
from gemma_tune.serving.sampling import Sampling

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "model"}


def chat_requests(service: Service, asked: ChatRequest, max_answers: int) -> list[Request]:
    """Returns the engine's requests for a conversation: one for each of `n` answers.

    Raises:
        ApiError: The model, the conversation or its length can't be answered.
    """
    turns = turns_of(asked.messages, service.template.control_tokens)
    text = "".join(piece.text for piece in service.template.pieces(turns)) + service.template.generation_prompt
    prompt = [service.tokenizer.bos_id, *service.tokenizer.encode(text)]
    num_logprobs = max(asked.top_logprobs or 0, 1) if asked.logprobs else 0
    longest = asked.max_completion_tokens or asked.max_tokens
    return _requests(service, asked, [prompt], longest, num_logprobs, max_answers)


def completion_requests(service: Service, asked: CompletionRequest, max_answers: int) -> list[Request]:
    """Returns the engine's requests for texts that are to go on: `n` for each prompt, in that order.

    A prompt may hold control tokens: who asks here writes turns by hand. `<bos>` is put before it unless it is there.

    Raises:
        ApiError: The model, a prompt or its length can't be answered.
    """
    prompts = [_encoded(service, prompt) for prompt in _prompts(asked)]
    num_logprobs = 0 if asked.logprobs is None else max(asked.logprobs, 1)
    return _requests(service, asked, prompts, asked.max_tokens, num_logprobs, max_answers)


def turns_of(messages: Sequence[Message], control_tokens: Sequence[str]) -> tuple[Turn, ...]:
    """Returns a conversation's turns: a system turn of all system messages, if there are any, then user and model.

    Raises:
        ApiError: They don't alternate, don't end with the user's, or hold a control token, with which a text could pass
            for another's turn.
    """
    for index, message in enumerate(messages):
        if found := [token for token in control_tokens if token in message.text]:
            raise _invalid(
                f"messages[{index}].content", f"holds {found[0]!r}, which marks turns and can't stand in one"
            )
    num_system = next((i for i, m in enumerate(messages) if _ROLES[m.role] != "system"), len(messages))
    system = "\n\n".join(message.text for message in messages[:num_system])
    turns = [Turn("system", system)] if system else []
    for index, message in enumerate(messages[num_system:]):
        wanted = "model" if index % 2 else "user"
        if _ROLES[message.role] != wanted:
            raise _invalid(
                f"messages[{index + num_system}].role",
                f"is {message.role!r}, and {'assistant' if index % 2 else 'user'!r} was expected: a conversation is "
                "user and assistant in turns, after system messages if there are any",
            )
        turns.append(Turn(wanted, message.text))
    if not turns or turns[-1].role != "user":
        raise _invalid("messages", "must end with a message of the user, which is then answered")
    return tuple(turns)


def _prompts(asked: CompletionRequest) -> Sequence[str | Sequence[int]]:
    prompt = asked.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _encoded(service: Service, prompt: str | Sequence[int]) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt.removeprefix(service.template.bos))]
    if (largest := max(prompt)) >= tokenizer.vocabulary_size:
        raise _invalid("prompt", f"holds the token id {largest}; this model's are below {tokenizer.vocabulary_size}")
    return list(prompt) if prompt[0] == tokenizer.bos_id else [tokenizer.bos_id, *prompt]


def _requests(
    service: Service,
    asked: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    longest: int | None,
    num_logprobs: int,
    max_answers: int,
) -> list[Request]:
    model, num_answers = service.model(asked.model), asked.n or 1
    if num_answers * len(prompts) > max_answers:
        raise _invalid("n", f"asks for {num_answers * len(prompts)} answers; a request may ask for {max_answers}")
    seed = secrets.randbits(31) if asked.seed is None else asked.seed % 2**32
    return [
        Request(
            prompt_ids=tuple(prompt),
            max_new_tokens=_room(service, len(prompt), longest),
            sampling=_sampling(asked, service.defaults.sampling),
            seed=(seed + index) % 2**32,
            stop_ids=service.stop_ids,
            stop_strings=asked.stop_strings,
            adapter=model.adapter,
            num_logprobs=num_logprobs,
        )
        for prompt in prompts
        for index in range(num_answers)
    ]


def _room(service: Service, num_prompt_tokens: int, longest: int | None) -> int:
    """Returns how long an answer may get: what was asked for, which must fit, or the default as far as it fits."""
    left = service.max_length - num_prompt_tokens
    if left < max(longest or 1, 1):
        wanted = f" and the answer {longest:,}" if longest else ""
        raise ApiError(
            400,
            f"The prompt has {num_prompt_tokens:,} tokens{wanted}; together they may have {service.max_length:,}.",
            param="messages" if longest is None else "max_tokens",
            code="context_length_exceeded",
        )
    return longest or min(service.defaults.max_new_tokens, left)


def _sampling(asked: GenerationRequest, default: Sampling) -> Sampling:
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if (value := getattr(asked, name)) is not None
    }
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return default._replace(**given)


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}.", param=param, code="invalid_value")
