"""A vocabulary as llguidance reads it: the bytes of each token, and which tokens are no text."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_tune.errors import ConfigError
from gemma_tune.models.sources.tokenizer import TextTokenizer

# Tokens that Gemma's vocabularies spell like text, but that are no text: marks of turns, tools, images, unused ones.
_NO_TEXT = re.compile(r"<unused\d+>|<(start|end)_\w+>|<(mask|escape)>|\[multimodal\]|<\|.*>|<.*\|>")


class GrammarTokenizer:
    """A tokenizer with what grammars need of it.

    Args:
        tokenizer: Tokenizer of the model.
        stop_ids: Tokens that end an answer. They are allowed where the grammar is complete.

    Attributes:
        library: The llguidance package.
        of_library: llguidance's LLTokenizer.
        stop_ids: Tokens that end an answer.
        lengths: [V] int32, number of bytes of each token; 0: no text.

    Raises:
        ConfigError: llguidance isn't installed.
    """

    def __init__(self, tokenizer: TextTokenizer, stop_ids: Sequence[int]):
        self.library: Any = _llguidance()
        self.stop_ids = tuple(stop_ids)
        texts = [_bytes_of(tokenizer, token) for token in range(tokenizer.vocabulary_size)]
        self.lengths = np.array([len(text or b"") for text in texts], np.int32)
        self._by_text = {text: token for token, text in enumerate(texts) if text}
        vocabulary = _Vocabulary(tokenizer, texts, self.stop_ids[0])
        self.of_library = self.library.LLTokenizer(
            self.library.TokenizerWrapper(vocabulary),
            eos_token=list(self.stop_ids),
            slices=self.library.LLTokenizer.json_slices(),
        )

    def token_of(self, text: str) -> int | None:
        """Returns the token with exactly this text, or None."""
        return self._by_text.get(text.encode())


class _Vocabulary:
    """What llguidance asks of a tokenizer, by the names that it asks for."""

    def __init__(self, tokenizer: TextTokenizer, texts: Sequence[bytes | None], eos_id: int):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.piece(token).encode() if text is None else text for token, text in enumerate(texts)]
        self.special_token_ids = [token for token, text in enumerate(texts) if text is None]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


def _bytes_of(tokenizer: TextTokenizer, token: int) -> bytes | None:
    """Returns a token's bytes, or None if it is no text."""
    text = tokenizer.bytes_of(token)
    if text is not None and text[:1] in (b"<", b"[") and _NO_TEXT.fullmatch(tokenizer.piece(token)):
        return None
    return text


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "JSON answers and required tool calls need llguidance. On the server, run: pip install 'gemma-tune[serve]'"
        ) from None
    return llguidance
