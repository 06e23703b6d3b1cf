"""Reads a GGUF file as a Hugging Face checkpoint: its config, its tensors by their Hugging Face names, its tokenizer.

KerasHub's own converter for Hugging Face checkpoints does the rest. Names and norms are mapped back from those of
llama.cpp's convert_hf_to_gguf.py, which stores RMS norms as 1 + scale.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.sources.gguf_reader import GgufFile

# Architecture in GGUF -> model_type of a config.json.
GGUF_MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORM_NAMES = {
    "gemma": {"post_attention_layernorm": "ffn_norm"},
    "gemma2": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_NORM_NAMES["gemma3_text"] = _NORM_NAMES["gemma2"]
# The only published sizes whose attention scale is not 1/sqrt(head width): layers of Gemma 2 27B and Gemma 3 27B.
# GGUF doesn't store the scale; llama.cpp tells by the number of layers too.
LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}


class GgufCheckpoint:
    """A GGUF file of a Gemma, seen as a Hugging Face checkpoint.

    Attributes:
        path: Path of the file.
        config: Contents of an equivalent config.json.

    Raises:
        ModelError: The file is damaged, or holds another kind of model.
    """

    def __init__(self, path: Path):
        self._file = GgufFile(path)
        architecture = self._file.text("general.architecture")
        if architecture not in GGUF_MODEL_TYPES:
            raise ModelError(
                f"{path} holds a model of the architecture {architecture or 'unknown'!r}. Gemma files of these can be "
                f"read: {', '.join(GGUF_MODEL_TYPES)}."
            )
        self.path = path
        self.config = self._config(architecture)

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop of a tensor, by its Hugging Face name, as float32."""
        name = self._name(key)
        values = self._file.rows(name, start, stop)
        return values - 1.0 if name.endswith("norm.weight") else values

    def num_rows(self, key: str) -> int:
        """Returns the length of a tensor's first axis."""
        return self._file.tensors[self._name(key)].shape[0]

    def tokenizer_proto(self) -> bytes:
        """Returns the serialized SentencePiece model, rebuilt from the metadata."""
        return sentencepiece_proto(self._file)

    def _name(self, key: str) -> str:
        name = gguf_name(key, self.config["model_type"])
        if name not in self._file.tensors:
            raise ModelError(
                f"{self.path} has no tensor {name!r} ({key}). Tensors: {', '.join(list(self._file.tensors)[:8])}, …"
            )
        return name

    def _config(self, architecture: str) -> dict[str, Any]:
        model_type = GGUF_MODEL_TYPES[architecture]
        width, layers = self._entry(architecture, "embedding_length"), self._entry(architecture, "block_count")
        heads, head_width = (
            self._entry(architecture, "attention.head_count"),
            self._entry(architecture, "attention.key_length"),
        )
        config: dict[str, Any] = {
            "model_type": model_type,
            "vocab_size": self._vocabulary_size(),
            "hidden_size": width,
            "num_hidden_layers": layers,
            "intermediate_size": self._entry(architecture, "feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._entry(architecture, "attention.head_count_kv", heads),
            "head_dim": head_width,
            "rms_norm_eps": self._entry(architecture, "attention.layer_norm_rms_epsilon", 1e-6),
            "max_position_embeddings": self._entry(architecture, "context_length", 8192),
        }
        is_27b = layers == LAYERS_OF_27B.get(model_type)
        config["query_pre_attn_scalar"] = width // heads if is_27b else head_width
        if model_type == "gemma2":
            config["sliding_window"] = self._entry(architecture, "attention.sliding_window", 4096)
            config["attn_logit_softcapping"] = self._entry(architecture, "attn_logit_softcapping", 50.0)
            config["final_logit_softcapping"] = self._entry(architecture, "final_logit_softcapping", 30.0)
        elif model_type == "gemma3_text":
            config["sliding_window"] = self._entry(architecture, "attention.sliding_window")
            factor = self._entry(architecture, "rope.scaling.factor", 1.0)
            if factor != 1.0:
                config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        return config

    def _entry(self, architecture: str, name: str, default: Any = None) -> Any:
        value = self._file.metadata.get(f"{architecture}.{name}", default)
        if not isinstance(value, (int, float)):
            raise ModelError(f"{self.path}: the metadata {architecture}.{name} is missing or not a number.")
        return value

    def _vocabulary_size(self) -> int:
        if "token_embd.weight" not in self._file.tensors:
            raise ModelError(f"{self.path} has no tensor 'token_embd.weight'.")
        if "output.weight" in self._file.tensors:
            raise ModelError(
                f"{self.path} has an LM head of its own (output.weight), but every Gemma ties it to the embedding."
            )
        return self._file.tensors["token_embd.weight"].shape[0]


def gguf_name(key: str, model_type: str) -> str:
    """Returns the name in GGUF of a tensor with a Hugging Face name; an unknown name stays as it is.

    Args:
        key: Name such as `model.layers.0.mlp.up_proj.weight`.
        model_type: `gemma`, `gemma2` or `gemma3_text`.
    """
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", key)
    if not match:
        return fixed.get(key, key)
    layer, part = match.groups()
    names = {**_LAYER_NAMES, **_NORM_NAMES[model_type]}
    return f"blk.{layer}.{names.get(part, part)}.weight"


def sentencepiece_proto(file: GgufFile) -> bytes:
    """Rebuilds the SentencePiece model from a GGUF file's metadata, and returns it serialized.

    GGUF marks `<unk>` and all turn tokens CONTROL. SentencePiece needs `<unk>` as UNKNOWN, and splits a CONTROL token
    in a text into letters, so all of them but pad, eos and bos become USER_DEFINED, as in Gemma's own tokenizer.model.
    GGUF spells runs of spaces with spaces, SentencePiece with its symbol for a space, U+2581.

    Raises:
        ModelError: The metadata holds no SentencePiece vocabulary.
    """
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # Its classes are made at import, where type checkers don't see them.
    tokens, scores, types = _vocabulary(file)
    ids = _special_ids(file, len(tokens))
    kinds = schema.ModelProto.SentencePiece
    known_kinds = set(kinds.Type.values())
    stays_control = {ids["padding"], ids["eos"], ids["bos"]}
    model = schema.ModelProto()
    for index, (token, score, kind) in enumerate(zip(tokens, scores.tolist(), types.tolist(), strict=True)):
        if index == ids["unknown"]:
            kind = kinds.UNKNOWN
        elif kind == kinds.CONTROL and index not in stays_control:
            kind = kinds.USER_DEFINED
        elif kind not in known_kinds:
            kind = kinds.NORMAL
        piece = token.decode("utf-8", errors="replace")
        if kind == kinds.USER_DEFINED:
            piece = piece.replace(" ", "▁")
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = schema.TrainerSpec.BPE, len(tokens), True
    for name, number in zip(("pad", "eos", "bos", "unk"), ids.values(), strict=True):
        setattr(trainer, f"{name}_id", number)
        setattr(trainer, f"{name}_piece", model.pieces[number].piece)
    for spec in (model.normalizer_spec, model.denormalizer_spec):
        spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces = False, False, True
    model.normalizer_spec.name = "identity"
    return model.SerializeToString()


def _vocabulary(file: GgufFile) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Returns the tokens of a GGUF file, their scores and their types."""
    kind = file.text("tokenizer.ggml.model")
    entries: list[Any] = [file.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
    if kind != "llama" or any(entry is None for entry in entries) or len(set(map(len, entries))) > 1:
        raise ModelError(
            f"{file.path} holds no SentencePiece vocabulary (tokenizer.ggml.model is {kind!r}, expected 'llama')."
        )
    tokens, scores, types = entries
    return tokens, scores, types


def _special_ids(file: GgufFile, num_tokens: int) -> dict[str, int]:
    """Returns the ids of the special tokens by their names in GGUF."""
    defaults = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id", number) for name, number in defaults.items()}
    if not all(isinstance(number, int) and 0 <= number < num_tokens for number in ids.values()):
        raise ModelError(
            f"{file.path} is damaged: it has {num_tokens} tokens, and its special tokens have the ids {ids}."
        )
    return ids
