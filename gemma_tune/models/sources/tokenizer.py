"""Encodes text with the SentencePiece model of a KerasHub tokenizer, and decodes it, without TensorFlow."""

from collections.abc import Sequence
from typing import Any

from gemma_tune.errors import ModelError


class TextTokenizer:
    """A tokenizer of text.

    A special token such as `<end_of_turn>` in a text becomes one id; `<bos>` and `<eos>` don't.

    Args:
        proto: Serialized SentencePiece model.
        processor: SentencePieceProcessor of that model. None: a new one is made.

    Attributes:
        proto: Serialized SentencePiece model.
        pad_id: Id of `<pad>`.
        bos_id: Id of `<bos>`.
        eos_id: Id of `<eos>`.
    """

    def __init__(self, proto: bytes, processor: Any = None):
        from sentencepiece import SentencePieceProcessor

        self.proto = proto
        self._processor = processor or SentencePieceProcessor(model_proto=proto)
        self.pad_id: int = max(self._processor.pad_id(), 0)
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()

    @property
    def vocabulary_size(self) -> int:
        """Number of pieces in the vocabulary."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without `<bos>`."""
        return self._processor.encode(text, out_type=int, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids. Bytes of an incomplete character become U+FFFD."""
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token_id: int) -> str:
        """Returns a token as it is spelled in the vocabulary."""
        return self._processor.id_to_piece(int(token_id))

    def bytes_of(self, token_id: int) -> bytes | None:
        """Returns a token's bytes, or None for a control token, the unknown token, and one that is never used."""
        processor = self._processor
        if processor.is_control(token_id) or processor.is_unknown(token_id) or processor.is_unused(token_id):
            return None
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # Spelled <0xE2>.
        return piece.replace("\u2581", " ").encode()

    def id_of(self, token: str) -> int:
        """Returns the id of a special token.

        Raises:
            ModelError: The vocabulary doesn't have the token.
        """
        token_id = self._processor.piece_to_id(token)
        if token_id == self._processor.unk_id():
            raise ModelError(f"The tokenizer has no token {token!r}, which the chat template needs.")
        return token_id


def tokenizer_of(model: Any) -> TextTokenizer:
    """Returns the tokenizer of a KerasHub CausalLM, which is made once for each model.

    Raises:
        ModelError: The model has no preprocessor.
    """
    if getattr(model, "preprocessor", None) is None:
        raise ModelError("The model has no preprocessor, hence no tokenizer. Load it with gemma_tune.load_model.")
    keras_tokenizer = model.preprocessor.tokenizer
    cached = getattr(keras_tokenizer, "_gemma_tune_text_tokenizer", None)
    if cached is None or cached.proto is not keras_tokenizer.proto:
        # It shares the processor of KerasHub, which takes 20 MB for Gemma 3.
        cached = TextTokenizer(keras_tokenizer.proto, getattr(keras_tokenizer, "_sentence_piece_spm", None))
        object.__setattr__(keras_tokenizer, "_gemma_tune_text_tokenizer", cached)
    return cached
