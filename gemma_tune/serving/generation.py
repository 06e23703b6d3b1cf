"""Text in, text out: chat turns to answers, whole or as a stream."""

from collections.abc import Iterator, Sequence

from gemma_tune.config import GenerationConfig
from gemma_tune.data import Turn, template_for
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import Params
from gemma_tune.models.sources.tokenizer import TextTokenizer, tokenizer_of
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.decode import decoder_of
from gemma_tune.serving.sampling import Sampling

_DEFAULTS = GenerationConfig()
_ROWS_AT_ONCE = 8
Prompt = str | Sequence[Turn]


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
) -> str | list[str]:
    """Answers one question or several.

    Args:
        model: From `load_model` or `train`.
        prompts: A question; or a list of questions, or of conversations that end with the user's turn.
        max_new_tokens: Longest answer, in tokens.
        temperature, top_k, top_p, min_p, repetition_penalty: As in `config.GenerationConfig`.
        seed: Of the sampling.
        params: Arrays to use in place of the model's own.

    Returns:
        The answer, or a list of them. An answer ends where the model ends its turn, or at max_new_tokens.
    """
    single = isinstance(prompts, str)
    asked: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
    tokenizer = tokenizer_of(model)
    encoded = [encode_prompt(model, tokenizer, prompt) for prompt in asked]
    # Prompts of similar length go together, so that little is padded.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    for start in range(0, len(order), _ROWS_AT_ONCE):
        chosen = order[start : start + _ROWS_AT_ONCE]
        rows: list[list[int]] = [[] for _ in chosen]
        steps = decoder_of(model).generate(
            [encoded[i] for i in chosen],
            max_new_tokens,
            stop_ids(model, tokenizer),
            Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
            seed,
            params,
        )
        for tokens in steps:
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        for index, row in zip(chosen, rows, strict=True):
            answers[index] = tokenizer.decode(row).strip()
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
    """Yields an answer piece by piece, as it is made.

    Arguments as in `generate`; the pieces together are its answer.
    """
    tokenizer = tokenizer_of(model)
    steps = decoder_of(model).generate(
        [encode_prompt(model, tokenizer, prompt)],
        max_new_tokens,
        stop_ids(model, tokenizer),
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed,
    )
    made: list[int] = []
    shown = ""
    for (token,) in steps:
        assert token is not None  # The only row: the steps end when it stops.
        made.append(token)
        text = tokenizer.decode(made).lstrip()
        # A character of several bytes may be cut in the middle, and white space at the end of the answer is not part of
        # it.
        ready = text.rstrip("\ufffd").rstrip()
        if ready.startswith(shown) and len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    rest = tokenizer.decode(made).strip()[len(shown) :]
    if rest:
        yield rest


def encode_prompt(model: keras.Model, tokenizer: TextTokenizer, prompt: Prompt) -> list[int]:
    """Returns the token ids of a question or conversation, up to where the answer begins."""
    turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    template = template_for(family_of(model))
    text = "".join(piece.text for piece in template.pieces(turns)) + template.generation_prompt
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def stop_ids(model: keras.Model, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Returns the tokens that end an answer."""
    return (tokenizer.id_of(template_for(family_of(model)).end_of_turn), tokenizer.eos_id)
