"""Writes PEFT adapters, GGUF files and LiteRT models with the signatures that `ExportFormat` calls."""

import re
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
from gemma_tune.export.peft.adapter import PeftModule, can_be_peft, peft_modules, write_peft_adapter
from gemma_tune.models.lora.peft_names import EMBEDDING
from gemma_tune.runtime.json_files import read_json
from gemma_tune.runtime.shell import gemma_tune_command

_GGUF_SCHEME = "f16"
_BASE_FOLDER = "base-hf"  # Where the card's examples have a base that is nowhere yet in Hugging Face's format.
# What vLLM's --max-lora-rank may be (vllm/config/lora.py).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_peft(model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
    """Writes adapter_config.json and adapter_model.safetensors. Of the options, base_name is used."""
    base = peft_base_name(options.base_name)
    write_peft_adapter(model, folder, base)
    modules, notes = peft_modules(model), []
    max_rank = max(one.lora_spec.rank for one in modules.values())
    if not base:
        command = gemma_tune_command("export", model=options.base_name or "BASE", format="hf", output=_BASE_FOLDER)
        notes.append(f"Other programs need the base model in a folder that they can read: {command}")
    elif Path(base).is_absolute():
        notes.append(
            f"adapter_config.json names {base} as the base model. On another machine, give PEFT the base's place there."
        )
    problem = vllm_problem(modules)
    if problem:
        notes.append(f"vLLM doesn't read this adapter: {problem}. It reads the merged model of --format=hf.")
    placeholders = {
        "BASE": base or _BASE_FOLDER,
        "NAMED": options.base_name or base or "BASE",
        "MAX_RANK": str(next((rank for rank in _VLLM_RANKS if rank >= max_rank), max_rank)),
    }
    return WrittenExport(notes, "peft, not for vLLM" if problem else "peft", placeholders)


def peft_base_name(source: str) -> str:
    """Returns what `from_pretrained` takes for a base model: a name on Hugging Face, or the full path of a folder in
    Hugging Face's format; '' for what it can't read, such as a tiny model, a Keras preset or a GGUF file.

    Args:
        source: Base model, as in `load_model`; '' if it isn't known.
    """
    if hub_name := hugging_face_name(source):
        return hub_name
    path = Path(source).expanduser()
    if source and path.exists():
        config = path / "config.json"
        return str(path.absolute()) if config.is_file() and "model_type" in read_json(config) else ""
    return source if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) else ""


def vllm_problem(modules: dict[str, PeftModule]) -> str:
    """Returns why vLLM refuses an adapter (vllm/lora/peft_helper.py, vllm/config/lora.py), or ''."""
    if any(one.lora_spec.use_dora for one in modules.values()):
        return "it knows no DoRA"
    if EMBEDDING in modules:
        return "it takes no LoRA on Gemma's embedding, which is also the LM head"
    rank = max(one.lora_spec.rank for one in modules.values())
    return f"its largest rank is {_VLLM_RANKS[-1]}, and this one has {rank}" if rank > _VLLM_RANKS[-1] else ""


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
