"""Writes a model as a Hugging Face directory: what transformers, vLLM and most others read."""

import json
from pathlib import Path
from typing import Any

from gemma_tune.data.chat_template import template_for
from gemma_tune.export.hf.config import hf_config
from gemma_tune.export.hf.safetensors_writer import write_sharded
from gemma_tune.export.hf.tensors import tensors_of
from gemma_tune.export.hf.tokenizer_files import write_tokenizer
from gemma_tune.export.options import ExportOptions, WrittenExport
from gemma_tune.models.family import family_of
from gemma_tune.models.layers import quantized_layers
from gemma_tune.models.quantized.convert import num_weights
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime import progress


def write_hf(model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
    """Writes config.json, generation_config.json, safetensors, and the tokenizer with its chat template.

    Args:
        model: A CausalLM without LoRA factors.
        folder: Empty.
        options: dtype and max_shard_size are used.

    Returns:
        What is to be said of it.

    Raises:
        ModelError: transformers' class for the family can't hold the model, or the dtype a weight.
    """
    tokenizer, template = tokenizer_of(model), template_for(family_of(model))
    config = hf_config(model, tokenizer, options.dtype)
    tensors = tensors_of(model.backbone, config)
    ends = [tokenizer.eos_id, tokenizer.id_of(template.end_of_turn)]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    write_tokenizer(folder, tokenizer, template, config["max_position_embeddings"])
    with progress.track_progress("tensors written", len(tensors)) as advance:
        write_sharded(folder, tensors, options.dtype, options.max_shard_bytes, advance)
    notes = [f"Quantized weights were written as the {options.dtype} numbers that they stand for."]
    return WrittenExport(notes if quantized_layers(model.backbone) else [], "hf")


def float_bytes(model: Any, options: ExportOptions) -> int:
    """Returns what all weights take as floats of `dtype`."""
    return (4 if options.dtype == "float32" else 2) * num_weights(model)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
