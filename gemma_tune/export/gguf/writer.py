"""Writes a Gemma as a GGUF file, for llama.cpp, Ollama, LM Studio and their like.

Tensors are those of the Hugging Face export under GGUF's names, with norms as 1 + scale (llama.cpp's
conversion/gemma.py). They are made, rounded and written one after the other, so that memory stays near the model's.
`models/sources/gguf_reader.py` reads such files.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.data.chat_template import template_for
from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.export.gguf.metadata import add_origin, add_sizes, add_tokenizer, family_for_gguf
from gemma_tune.export.gguf.modelfile import modelfile
from gemma_tune.export.gguf.tensor_types import GGUF_SCHEMES, tensor_num_bytes, to_type, type_of
from gemma_tune.export.hf.config import hf_config
from gemma_tune.export.hf.tensors import Tensor, tensors_of
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.shared_copy import shared_copy
from gemma_tune.models.sources.gguf_checkpoint import gguf_name
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime import progress
from gemma_tune.runtime.atomic_files import write_text

_BYTES_PER_TOKEN = 40  # Of the vocabulary: a piece and its length, score and type.
_CONTEXT_OF_MODELFILE = 8192  # What Ollama reserves memory for; a user may raise it.


class _Entry(NamedTuple):
    """A tensor as it is written. kind: Its number format."""

    name: str
    shape: tuple[int, ...]
    kind: str
    tensor: Tensor


def write_gguf(model: Any, file: str | os.PathLike, scheme: str = "f16", *, name: str = "", base: str = "") -> Path:
    """Writes one GGUF file, and an Ollama `Modelfile` beside it.

    Args:
        model: A CausalLM of Gemma 1, 2 or 3 with its tokenizer. LoRA counts as merged, and codes as the floats that
            they stand for; the model stays as it is.
        file: Where to. What is there is overwritten.
        scheme: A key of `gguf_types.GGUF_SCHEMES`: `f32`, `f16`, `bf16`, `q8_0`, `q4_k_m`, `q4_0`.
        name: What programs show of it; '' for the file's name.
        base: The model that it was made of, such as `gemma3_270m` or `hf://google/gemma-3-270m-it`.

    Returns:
        The file.

    Raises:
        ModelError: llama.cpp has no such model, there is no such scheme, or a value doesn't fit the format.
    """
    import gguf

    if lora_layers(model.backbone):
        model = shared_copy(model)
        merge_lora(model.backbone)
    path, tokenizer = Path(file), tokenizer_of(model)
    family = family_for_gguf(model.backbone)
    config = hf_config(model, tokenizer, "float32")
    entries = _entries(model, config, scheme)
    writer = gguf.GGUFWriter(path, family)
    try:
        add_origin(writer, family, sum(tensor_num_bytes(e.shape, "F32") // 4 for e in entries), name or path.stem, base)
        add_sizes(writer, config, family)
        writer.add_file_type(GGUF_SCHEMES[scheme].file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, template_for(family))
        _write_tensors(writer, entries)
    finally:
        writer.close()
    context = min(_CONTEXT_OF_MODELFILE, config["max_position_embeddings"])
    write_text(path.with_name("Modelfile"), modelfile(path.name, template_for(family), context))
    return path


def estimate_gguf(model: Any, scheme: str = "f16") -> int:
    """Returns about how many bytes `write_gguf` will write; raises what it would."""
    family_for_gguf(model.backbone)
    tokenizer = tokenizer_of(model)
    entries = _entries(model, hf_config(model, tokenizer, "float32"), scheme)
    return sum(tensor_num_bytes(e.shape, e.kind) for e in entries) + tokenizer.vocabulary_size * _BYTES_PER_TOKEN


def _entries(model: Any, config: dict[str, Any], scheme: str) -> list[_Entry]:
    if scheme not in GGUF_SCHEMES:
        raise ModelError(
            f"There is no GGUF scheme {scheme!r}.{did_you_mean(scheme, GGUF_SCHEMES)} Known: {', '.join(GGUF_SCHEMES)}."
        )
    num_tokens = tokenizer_of(model).vocabulary_size
    entries = []
    for tensor in tensors_of(model.backbone, config):
        name, shape = gguf_name(tensor.name, config["model_type"]), tensor.shape
        if name == "token_embd.weight":
            # llama.cpp wants a row for each token, and no others.
            if shape[0] < num_tokens:
                raise ModelError(f"The embedding has {shape[0]} rows for a tokenizer of {num_tokens} tokens.")
            shape = (num_tokens, *shape[1:])
        entries.append(_Entry(name, shape, type_of(name, shape, scheme, config["num_hidden_layers"]), tensor))
    return entries


def _write_tensors(writer: Any, entries: list[_Entry]) -> None:
    import gguf

    for name, shape, kind, _ in entries:
        quantization = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor_num_bytes(shape, kind), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out = writer.fout[0]
    with progress.track_progress("tensors written", len(entries)) as advance:
        for entry in entries:
            writer.write_padding(out, out.tell())
            for values in _values(entry):
                to_type(values, entry.kind, entry.name).tofile(out)
            advance(1)
    writer.write_padding(out, out.tell())


def _values(entry: _Entry) -> Iterator[np.ndarray]:
    """Yields the values as llama.cpp takes them, float32, some rows at a time."""
    left = entry.shape[0]
    for rows in entry.tensor.chunks(np.dtype(np.float32)):
        values = rows[:left]
        left -= len(values)
        if len(values):
            yield values + 1 if entry.name.endswith("norm.weight") else values
