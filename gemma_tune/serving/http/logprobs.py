"""Formats log-probabilities as OpenAI's API does, differently for chats and for completions."""

from typing import Any

from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.serving.engine.request import AnswerDelta, TokenLogprob


def chat_logprobs(delta: AnswerDelta, num_top: int, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Returns the `logprobs` of a choice of a chat.

    Args:
        delta: Delta of an answer, or a complete answer.
        num_top: Number of most likely tokens to show at each position.
        tokenizer: Tokenizer of the model.
    """
    tops = delta.top_logprobs or ((),) * len(delta.logprobs)
    return {
        "content": [
            {**_entry(token, tokenizer), "top_logprobs": [_entry(other, tokenizer) for other in top[:num_top]]}
            for token, top in zip(delta.logprobs, tops, strict=True)
        ],
        "refusal": None,
    }


def text_logprobs(delta: AnswerDelta, num_top: int, offset: int) -> dict[str, Any]:
    """Returns the `logprobs` of a choice of a completion.

    Args:
        delta: Delta of an answer, or a complete answer.
        num_top: Number of most likely tokens to show at each position.
        offset: Number of characters of the tokens before.
    """
    offsets = []
    for token in delta.logprobs:
        offsets.append(offset)
        offset += len(token.text)
    tops = delta.top_logprobs or ((),) * len(delta.logprobs)
    return {
        "tokens": [token.text for token in delta.logprobs],
        "token_logprobs": [token.logprob for token in delta.logprobs],
        "top_logprobs": [{other.text: other.logprob for other in top[:num_top]} for top in tops] if num_top else None,
        "text_offset": offsets,
    }


def _entry(token: TokenLogprob, tokenizer: TextTokenizer) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": _bytes(token, tokenizer)}


def _bytes(token: TokenLogprob, tokenizer: TextTokenizer) -> list[int]:
    """Returns a token's bytes. The vocabulary spells a token that is one byte of a character as `<0xE2>`."""
    piece = tokenizer.piece(token.token_id)
    if len(piece) == 6 and piece.startswith("<0x"):
        return [int(piece[3:5], 16)]
    return list(token.text.encode())
