"""Generates answers to questions and conversations, whole or as a stream."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from gemma_tune.config import GenerationConfig
from gemma_tune.models.functional import Params
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.decode import decoder_of
from gemma_tune.serving.prompt_encoder import Prompt, prompt_encoder_of
from gemma_tune.serving.sampling import Sampling
from gemma_tune.serving.text_stream import TextStream, without_outer_space

_DEFAULTS = GenerationConfig()
_MAX_BATCH_SIZE = 8


def generate(
    model: keras.Model,
    prompts: str | Sequence[Prompt],
    *,
    max_new_tokens: int = _DEFAULTS.max_new_tokens,
    temperature: float = _DEFAULTS.temperature,
    top_k: int = _DEFAULTS.top_k,
    top_p: float = _DEFAULTS.top_p,
    min_p: float = _DEFAULTS.min_p,
    repetition_penalty: float = _DEFAULTS.repetition_penalty,
    seed: int = 0,
    params: Params | None = None,
    before_batch: Callable[[int], object] = lambda num_answered: None,
) -> str | list[str]:
    """Answers one question or several.

    Args:
        model: Model from `load_model` or `train`.
        prompts: One question; or a list of questions, or of conversations that end with the user's turn.
        max_new_tokens: Longest answer, in tokens.
        temperature: Sampling temperature; 0 takes the most likely token.
        top_k: Number of most likely tokens to sample from; 0: all.
        top_p: Probability that the tokens to sample from hold together; 1: all.
        min_p: Smallest probability of a token, as a share of the most likely one's.
        repetition_penalty: Divisor of the positive logits of tokens that have occurred; 1: none.
        seed: Random seed of the sampling.
        params: Arrays to use in place of the model's own.
        before_batch: Called before each batch of prompts with the number of those answered so far; may raise to stop.

    Returns:
        The answer to a single question, or a list of answers. An answer ends where the model ends its turn, or after
        max_new_tokens.
    """
    single = isinstance(prompts, str)
    asked: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
    encoder = prompt_encoder_of(model)
    encoded = [encoder.encode(prompt) for prompt in asked]
    # Prompts of similar length share a batch, so that there is little padding.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    for start in range(0, len(order), _MAX_BATCH_SIZE):
        before_batch(start)
        chosen = order[start : start + _MAX_BATCH_SIZE]
        steps = decoder_of(model).generate(
            [encoded[i] for i in chosen],
            max_new_tokens,
            encoder.stop_ids,
            Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
            seed,
            params,
        )
        for index, row in zip(chosen, _rows(steps, len(chosen)), strict=True):
            answers[index] = encoder.tokenizer.decode(row).strip()
    return answers[0] if single else answers


def stream(
    model: keras.Model,
    prompt: Prompt,
    *,
    max_new_tokens: int = _DEFAULTS.max_new_tokens,
    temperature: float = _DEFAULTS.temperature,
    top_k: int = _DEFAULTS.top_k,
    top_p: float = _DEFAULTS.top_p,
    min_p: float = _DEFAULTS.min_p,
    repetition_penalty: float = _DEFAULTS.repetition_penalty,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the text of one answer part by part, while it is generated.

    The arguments are those of `generate`, and the parts together are its answer.
    """
    encoder = prompt_encoder_of(model)
    steps = decoder_of(model).generate(
        [encoder.encode(prompt)],
        max_new_tokens,
        encoder.stop_ids,
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed,
    )
    text = TextStream(encoder.tokenizer.decode)

    def parts() -> Iterator[str]:
        for (token,) in steps:
            assert token is not None  # The only row: the steps end when it stops.
            yield text.push(token)
        yield text.finish()

    yield from without_outer_space(parts())


def _rows(steps: Iterable[Sequence[int | None]], num_rows: int) -> list[list[int]]:
    """Returns the tokens of each row, from the steps of a Decoder."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for tokens in steps:
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows
