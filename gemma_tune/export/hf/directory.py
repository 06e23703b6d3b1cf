"""Writes a model as a Hugging Face directory, which transformers, vLLM and most other programs read."""

from pathlib import Path
from typing import Any

from gemma_tune.data.chat_template import template_for
from gemma_tune.export.hf.config import hf_config
from gemma_tune.export.hf.safetensors_shards import write_shards
from gemma_tune.export.hf.tensors import tensors_of
from gemma_tune.export.hf.tokenizer_files import write_tokenizer
from gemma_tune.export.options import ExportOptions, WrittenExport
from gemma_tune.models.family import family_of
from gemma_tune.models.layers import quantized_layers
from gemma_tune.models.quantized.convert import num_weights
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime import progress
from gemma_tune.runtime.atomic_files import write_json


def write_hf(model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
    """Writes config.json, generation_config.json, safetensors files, and the tokenizer with its chat template.

    Args:
        model: CausalLM without LoRA factors.
        folder: Empty folder.
        options: Export options, of which dtype and max_shard_size are used.

    Raises:
        ModelError: transformers' class of the family can't represent the model, or float16 can't hold a weight.
    """
    tokenizer = tokenizer_of(model)
    template = template_for(family_of(model), tokenizer)
    config = hf_config(model, tokenizer, options.dtype)
    tensors = tensors_of(model.backbone, config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    write_tokenizer(folder, tokenizer, template, config["max_position_embeddings"])
    with progress.track_progress("tensors written", len(tensors)) as advance:
        write_shards(folder, tensors, options.dtype, options.max_shard_bytes, advance)
    notes = [f"Quantized weights were written as the {options.dtype} values that they represent."]
    return WrittenExport(notes if quantized_layers(model.backbone) else [], "hf")


def hf_bytes(model: Any, options: ExportOptions) -> int:
    """Returns the size in bytes of all weights as floats of the options' dtype."""
    return (4 if options.dtype == "float32" else 2) * num_weights(model)
