"""Writes PEFT adapters, GGUF files and LiteRT models with the signatures that `ExportFormat` calls."""

from pathlib import Path
from typing import Any

from gemma_tune.errors import ModelError
from gemma_tune.export.card.provenance import hugging_face_name
from gemma_tune.export.gguf.writer import estimate_gguf, write_gguf
from gemma_tune.export.litert.model import (
    DEFAULT_LENGTHS,
    WEIGHT_FORMATS,
    Lengths,
    check_litert,
    estimate_litert,
    write_litert,
)
from gemma_tune.export.options import ExportOptions, WrittenExport
from gemma_tune.export.peft.adapter import can_be_peft, peft_modules, write_peft_adapter

_GGUF_SCHEME = "f16"


def write_peft(model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
    """Writes adapter_config.json and adapter_model.safetensors. Of the options, base_name is used."""
    base = hugging_face_name(options.base_name) or options.base_name
    write_peft_adapter(model, folder, base)
    notes = []
    if not hugging_face_name(options.base_name):
        notes.append(
            "The base model is not known to be on Hugging Face: export it with --format=hf, and give PEFT that folder."
        )
    max_rank = max(one.lora_spec.rank for one in peft_modules(model).values())
    placeholders = {"BASE": base, "NAMED": options.base_name or base, "MAX_RANK": str(max_rank)}
    return WrittenExport(notes, "peft", placeholders)


def peft_bytes(model: Any, options: ExportOptions) -> int:
    """Returns the size of the factors in bytes."""
    del options
    if problem := can_be_peft(model):
        raise ModelError(problem)
    return sum(value.nbytes for one in peft_modules(model).values() for value in one.tensors.values())


def write_gguf_folder(model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
    """Writes a GGUF file and a Modelfile. Of the options, scheme and base_name are used."""
    scheme = options.scheme or _GGUF_SCHEME
    file = write_gguf(model, folder / f"model-{scheme}.gguf", scheme, base=options.base_name)
    return WrittenExport([], "gguf", {"FILE": file.name})


def gguf_bytes(model: Any, options: ExportOptions) -> int:
    """Returns the approximate size of the file in bytes."""
    return estimate_gguf(model, options.scheme or _GGUF_SCHEME)


def write_litert_folder(model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
    """Writes a .tflite file with its tokenizer. Of the options, scheme and cache_length are used."""
    write_litert(model, folder, lengths=_lengths(options), weight_format=options.scheme or WEIGHT_FORMATS[0])
    return WrittenExport([], "litert")


def litert_bytes(model: Any, options: ExportOptions) -> int:
    """Returns the approximate disk space in bytes that the conversion needs."""
    check_litert(model, _lengths(options), options.scheme or WEIGHT_FORMATS[0])
    return estimate_litert(model)


def _lengths(options: ExportOptions) -> Lengths:
    return DEFAULT_LENGTHS._replace(cache=options.cache_length) if options.cache_length else DEFAULT_LENGTHS
