"""Log-probabilities as OpenAI's API writes them, once for chat and once for completions."""

from typing import Any

from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.serving.engine.request import AnswerDelta, TokenLogprob


def chat_logprobs(piece: AnswerDelta, num_top: int, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Returns `logprobs` of a choice of a chat.

    Args:
        piece: Of an answer, or all of it.
        num_top: Likeliest tokens to show at each place.
        tokenizer: Of the model.
    """
    tops = piece.top_logprobs or ((),) * len(piece.logprobs)
    return {
        "content": [
            {**_entry(token, tokenizer), "top_logprobs": [_entry(other, tokenizer) for other in top[:num_top]]}
            for token, top in zip(piece.logprobs, tops, strict=True)
        ],
        "refusal": None,
    }


def text_logprobs(piece: AnswerDelta, num_top: int, offset: int) -> dict[str, Any]:
    """Returns `logprobs` of a choice of a completion. offset: characters of the tokens before."""
    offsets = []
    for token in piece.logprobs:
        offsets.append(offset)
        offset += len(token.text)
    tops = piece.top_logprobs or ((),) * len(piece.logprobs)
    return {
        "tokens": [token.text for token in piece.logprobs],
        "token_logprobs": [token.logprob for token in piece.logprobs],
        "top_logprobs": [{other.text: other.logprob for other in top[:num_top]} for top in tops] if num_top else None,
        "text_offset": offsets,
    }


def _entry(token: TokenLogprob, tokenizer: TextTokenizer) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": _bytes(token, tokenizer)}


def _bytes(token: TokenLogprob, tokenizer: TextTokenizer) -> list[int]:
    """Returns the bytes a token stands for; those of a part of a character are spelled `<0xE2>` in the vocabulary."""
    piece = tokenizer.piece(token.token_id)
    if len(piece) == 6 and piece.startswith("<0x"):
        return [int(piece[3:5], 16)]
    return list(token.text.encode())
