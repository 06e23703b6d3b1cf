"""Writes a SentencePiece model as the files that transformers' tokenizers read.

tokenizer.json, which the `tokenizers` library reads (huggingface.co/docs/tokenizers), describes byte-pair encoding by a
list of merges. SentencePiece merges two pieces if together they are a piece, that with the best score first; so the
merges are all splits of a piece into two others, in the order of the pieces' scores. User-defined pieces, which
SentencePiece finds before it merges anything, become added tokens, which are found first too, in the text with its
spaces replaced.
"""

import json
from pathlib import Path
from typing import Any

from gemma_tune.data.chat_template import ChatTemplate
from gemma_tune.errors import ModelError
from gemma_tune.export.jinja_template import jinja_template
from gemma_tune.models.sources.tokenizer import TextTokenizer

_SPACE = "▁"
_CLASS = "PreTrainedTokenizerFast"  # With this class, transformers uses tokenizer.json unchanged.


def write_tokenizer(folder: Path, tokenizer: TextTokenizer, template: ChatTemplate, context_tokens: int) -> None:
    """Writes tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Raises:
        ModelError: The SentencePiece model is not of Gemma's kind.
    """
    pieces = _pieces(tokenizer.proto)
    special = {name: piece for name, piece in _special_tokens(tokenizer, pieces).items() if piece}
    settings = {
        "tokenizer_class": _CLASS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
        "padding_side": "left",
        **special,
    }
    (folder / "tokenizer.model").write_bytes(tokenizer.proto)
    for name, value in (
        ("tokenizer.json", _tokenizer_json(pieces, tokenizer, template)),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(jinja_template(template), encoding="utf-8")


def _pieces(proto: bytes) -> list[Any]:
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # Its classes are made at import, so that type checkers don't see them.
    model = schema.ModelProto.FromString(proto)
    normalizer, kind = model.normalizer_spec, model.trainer_spec.model_type
    if kind != schema.TrainerSpec.BPE or normalizer.precompiled_charsmap or normalizer.add_dummy_prefix:
        raise ModelError(
            "The tokenizer can't be written as tokenizer.json: it is not of Gemma's kind, which is byte-pair encoding "
            "without normalization and without a space before the text."
        )
    return list(model.pieces)


def _special_tokens(tokenizer: TextTokenizer, pieces: list[Any]) -> dict[str, str]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    unknown = next((piece.piece for piece in pieces if piece.type == piece.UNKNOWN), "")
    return {**{name: pieces[number].piece for name, number in ids.items()}, "unk_token": unknown}


def _tokenizer_json(pieces: list[Any], tokenizer: TextTokenizer, template: ChatTemplate) -> dict[str, Any]:
    bos = pieces[tokenizer.bos_id].piece
    first, second = ({"Sequence": {"id": one, "type_id": 0}} for one in "AB")
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    unknown = next((piece.piece for piece in pieces if piece.type == piece.UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(pieces, template),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, start, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: number for number, piece in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _added_tokens(pieces: list[Any], template: ChatTemplate) -> list[dict[str, Any]]:
    tokens = []
    for number, piece in enumerate(pieces):
        if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.USER_DEFINED):
            is_special = piece.type != piece.USER_DEFINED or piece.piece in template.turn_tokens
            token = {"id": number, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False}
            tokens.append({**token, "normalized": not is_special, "special": is_special})
    return tokens


def _merges(pieces: list[Any]) -> list[list[str]]:
    scores = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
    merges = []
    for whole in sorted(scores, key=lambda piece: -scores[piece]):  # Stable: equal scores stay in their order.
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in scores and right in scores:
                merges.append([left, right])
    return merges
