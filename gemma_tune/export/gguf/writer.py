"""Writes a model as a GGUF file, for llama.cpp, Ollama, LM Studio and similar programs.

The tensors are those of the Hugging Face export under GGUF's names, with norms as 1 + scale (llama.cpp's
conversion/gemma.py). They are converted, rounded and written one by one, so that little memory is needed beyond the
model's. `models/sources/gguf_reader.py` reads such files.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.data.chat_template import template_for
from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.export.gguf.metadata import add_hyperparameters, add_provenance, add_tokenizer, family_for_gguf
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

_BYTES_PER_TOKEN = 40  # Size of a vocabulary entry: a piece and its length, score and type.
_CONTEXT_OF_MODELFILE = 8192  # Ollama reserves memory for this many tokens; a user may raise it.


class _Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str  # GGML type.
    tensor: Tensor


def write_gguf(model: Any, file: str | os.PathLike, scheme: str = "f16", *, name: str = "", base: str = "") -> Path:
    """Writes one GGUF file, and an Ollama `Modelfile` beside it.

    Args:
        model: CausalLM of Gemma 1, 2 or 3 with its tokenizer. LoRA is written merged, and quantized weights as the
            floats that they represent; the model itself isn't changed.
        file: Path of the file. An existing file is overwritten.
        scheme: A key of `gguf_types.GGUF_SCHEMES`: `f32`, `f16`, `bf16`, `q8_0`, `q4_k_m`, `q4_0`.
        name: Model name that programs show; '' for the file's name.
        base: Base model, such as `gemma3_270m` or `hf://google/gemma-3-270m-it`.

    Returns:
        The path of the file.

    Raises:
        ModelError: llama.cpp can't represent the model, the scheme is unknown, or float16 can't hold a value.
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
        num_weights = sum(math.prod(entry.shape) for entry in entries)
        add_provenance(writer, family, num_weights, name or path.stem, base)
        add_hyperparameters(writer, config, family)
        writer.add_file_type(GGUF_SCHEMES[scheme].file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, template_for(family, tokenizer))
        _write_tensors(writer, entries)
    finally:
        writer.close()
    context = min(_CONTEXT_OF_MODELFILE, config["max_position_embeddings"])
    write_text(path.with_name("Modelfile"), modelfile(path.name, template_for(family, tokenizer), context))
    return path


def estimate_gguf(model: Any, scheme: str = "f16") -> int:
    """Returns the approximate size in bytes of the file that `write_gguf` writes.

    Raises:
        ModelError: llama.cpp can't represent the model, or the scheme is unknown.
    """
    family_for_gguf(model.backbone)
    tokenizer = tokenizer_of(model)
    entries = _entries(model, hf_config(model, tokenizer, "float32"), scheme)
    num_bytes = sum(tensor_num_bytes(entry.shape, entry.kind) for entry in entries)
    return num_bytes + tokenizer.vocabulary_size * _BYTES_PER_TOKEN


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
            # llama.cpp expects exactly one row for each token.
            if shape[0] < num_tokens:
                raise ModelError(f"The embedding has {shape[0]} rows, but the tokenizer has {num_tokens} tokens.")
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
    """Yields the values as llama.cpp expects them, in float32, some rows at a time."""
    left = entry.shape[0]
    for rows in entry.tensor.chunks(np.dtype(np.float32)):
        values = rows[:left]
        left -= len(values)
        if len(values):
            yield values + 1 if entry.name.endswith("norm.weight") else values
