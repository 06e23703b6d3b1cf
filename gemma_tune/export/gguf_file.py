"""Writes a Gemma as a GGUF file, for llama.cpp, Ollama, LM Studio and their like.

Tensors are made, rounded and written some rows at a time, so that memory stays near the model's. `models/gguf_file.py`
reads such files.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.export.gguf_metadata import add_origin, add_sizes, add_tokenizer, context_length, family_for_gguf
from gemma_tune.export.gguf_tensors import GgufTensor, gguf_tensors
from gemma_tune.export.gguf_types import SCHEMES, num_bytes, to_type, type_of
from gemma_tune.export.modelfile import modelfile
from gemma_tune.files import write_text
from gemma_tune.models.tokenizer import tokenizer_of

_SLACK_PER_TOKEN = 40  # Bytes in the vocabulary: the piece and its length, score and type.
_CONTEXT_OF_MODELFILE = 8192  # What Ollama reserves memory for; a user may raise it.


def write_gguf(
    model: Any,
    file: str | os.PathLike,
    scheme: str = "f16",
    *,
    name: str = "",
    base: str = "",
    chat_template: str = "",
) -> dict[str, int]:
    """Writes one GGUF file, and an Ollama `Modelfile` beside it.

    Args:
        model: A CausalLM of Gemma 1, 2 or 3 with its tokenizer. LoRA counts as merged, and codes as the floats that
            they stand for; the model stays as it is.
        file: Where to. Something that is there is overwritten.
        scheme: A key of `gguf_types.SCHEMES`: `f32`, `f16`, `bf16`, `q8_0`, `q4_k_m`, `q4_0`.
        name: What programs show of it; '' for the file's name.
        base: The model that it was made of, such as `google/gemma-3-270m-it`.
        chat_template: Jinja, for programs that render conversations.

    Returns:
        How many weights are in each number format.

    Raises:
        ModelError: llama.cpp has no such model, there is no such scheme, or a value doesn't fit the format.
    """
    import gguf

    path = Path(file)
    backbone = model.backbone
    family = family_for_gguf(backbone)
    kinds = _kinds(model, scheme)
    writer = gguf.GGUFWriter(path, family)
    try:
        add_origin(writer, family, sum(size for size, _ in kinds.values()), name or path.stem, base)
        add_sizes(writer, backbone, family)
        writer.add_file_type(SCHEMES[scheme].file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        num_tokens = add_tokenizer(writer, tokenizer_of(model), family, chat_template)
        tensors = list(gguf_tensors(backbone, family, num_tokens))
        _write(writer, [(tensor, kinds[tensor.name][1]) for tensor in tensors])
    finally:
        writer.close()
    longest = min(_CONTEXT_OF_MODELFILE, context_length(backbone, family))
    write_text(path.with_name("Modelfile"), modelfile(path.name, family, longest))
    counts: dict[str, int] = {}
    for size, kind in kinds.values():
        counts[kind] = counts.get(kind, 0) + size
    return counts


def estimate_gguf(model: Any, scheme: str = "f16") -> int:
    """Returns about how many bytes `write_gguf` will write; the errors are its own."""
    family_for_gguf(model.backbone)
    tensors = _tensors(model)
    kinds = _kinds(model, scheme)
    size = sum(num_bytes(tensor.shape, kinds[tensor.name][1]) for tensor in tensors)
    return size + tokenizer_of(model).vocabulary_size * _SLACK_PER_TOKEN


def _kinds(model: Any, scheme: str) -> dict[str, tuple[int, str]]:
    """Returns each tensor's number of weights and its format."""
    if scheme not in SCHEMES:
        raise ModelError(
            f"There is no GGUF scheme {scheme!r}.{did_you_mean(scheme, SCHEMES)} Known: {', '.join(SCHEMES)}."
        )
    num_layers = model.backbone.num_layers
    return {
        tensor.name: (num_bytes(tensor.shape, "F32") // 4, type_of(tensor, scheme, num_layers))
        for tensor in _tensors(model)
    }


def _tensors(model: Any) -> list[GgufTensor]:
    """The tensors of a model; one is only made when its rows are asked for."""
    return list(gguf_tensors(model.backbone, family_for_gguf(model.backbone), tokenizer_of(model).vocabulary_size))


def _write(writer: Any, tensors: list[tuple[GgufTensor, str]]) -> None:
    import gguf
    import numpy as np

    for tensor, kind in tensors:
        size = num_bytes(tensor.shape, kind)
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out: BinaryIO = writer.fout[0]
    for tensor, kind in tensors:
        writer.write_padding(out, out.tell())
        for start in range(0, tensor.shape[0], tensor.rows_at_once):
            stop = min(start + tensor.rows_at_once, tensor.shape[0])
            to_type(tensor.rows(start, stop), kind, tensor.name).tofile(out)
    writer.write_padding(out, out.tell())
    out.flush()
    os.fsync(out.fileno())
