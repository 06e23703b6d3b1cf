"""Saves and loads LoRA adapters: as gemma_tune's safetensors files, as KerasHub's `.lora.h5`, and from PEFT."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.base_fingerprint import fingerprint, sample_values
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.adapter_file import lora_metadata, read_adapter, specs_in_metadata, write_adapter
from gemma_tune.models.lora.enable import enable_lora, enable_on_layers, layers_with_weights, lora_specs
from gemma_tune.models.lora.keras_file import load_keras_adapter, save_keras_adapter
from gemma_tune.models.lora.peft_import import is_peft, load_peft_adapter
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.processes import fetch_to_host

ADAPTER_FILE = "adapter.safetensors"


def save_adapter(model: keras.Model, path: str | os.PathLike, base_model: str = "") -> Path:
    """Writes a model's LoRA factors, without its base weights.

    Args:
        model: CausalLM with LoRA.
        path: Directory for `adapter.safetensors`, or file name that ends in `.safetensors` or `.lora.h5`.
        base_model: Name of the base model, for the adapter's metadata.

    Returns:
        The file written.

    Raises:
        ModelError: The model has no LoRA factors, or the format can't represent them.
    """
    layers = lora_layers(model.backbone)
    if not layers:
        raise ModelError(
            "The model has no LoRA factors to save. Train it with training.method=lora, or call enable_lora first."
        )
    path = Path(path).expanduser()
    if path.name.endswith(".lora.h5"):
        save_keras_adapter(model, path)
        return path
    file = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
    names = {layer.name for layer in layers}
    targets = {layer.path: layer.name for layer in layers_with_weights(model.backbone) if layer.name in names}
    metadata = {
        "family": family_of(model),
        "base_model": base_model,
        "base_fingerprint": fingerprint(model),
        "base_values": json.dumps(sample_values(model)),
        **lora_metadata(lora_specs(model.backbone), targets),
    }
    write_adapter(file, metadata, {name: fetch_to_host(variable.value) for name, variable in _factors(model).items()})
    return file


def load_adapter(model: keras.Model, path: str | os.PathLike) -> None:
    """Enables LoRA on a freshly loaded base model and loads an adapter's factors.

    Args:
        model: CausalLM that the adapter was trained on.
        path: File or directory of `save_adapter`, workdir of a run, KerasHub's `.lora.h5`, or directory of a PEFT
            adapter.

    Raises:
        ModelError: The adapter doesn't exist, is damaged, or is for another base model.
    """
    path = adapter_path(path)
    if is_peft(path):
        load_peft_adapter(model, path)
        return
    file = path / ADAPTER_FILE if path.is_dir() else path
    if not file.exists():
        raise ModelError(f"There is no adapter at {file}.")
    if file.name.endswith(".lora.h5"):
        load_keras_adapter(model, file)
        return
    metadata, factors = read_adapter(file)
    _check_base(model, metadata, file)
    common, by_layer = specs_in_metadata(metadata)
    if by_layer:
        enable_on_layers(model.backbone, by_layer, seed=0)
    else:
        targets = json.loads(metadata["target_layers"])
        layout, rank, alpha, *flags = common
        enable_lora(model.backbone, rank, alpha, targets, 0, layout, *flags)
    variables = _factors(model)
    if set(variables) != set(factors):
        raise ModelError(
            f"{file} and the model don't have the same LoRA factors. They differ in "
            f"{', '.join(sorted(set(variables) ^ set(factors))[:4])}."
        )
    for name, variable in variables.items():
        if tuple(variable.shape) != factors[name].shape:
            raise ModelError(
                f"{file}: {name} has the shape {factors[name].shape}, but the model's has {tuple(variable.shape)}."
            )
    for name, variable in variables.items():
        variable.assign(factors[name])


def adapter_path(path: str | os.PathLike) -> Path:
    """Returns the path of an adapter, which is in a folder of that name in a run."""
    folder = Path(path).expanduser()
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def read_adapter_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Returns the metadata of an adapter, such as family, base_model, base_fingerprint, rank, alpha, target_layers."""
    path = adapter_path(path)
    return read_adapter(path / ADAPTER_FILE if path.is_dir() else path)[0]


def _factors(model: keras.Model) -> dict[str, keras.Variable]:
    return {path: variable for path, variable in variables_by_path(model).items() if "lora_" in path.rsplit("/", 1)[-1]}


def _check_base(model: keras.Model, metadata: Mapping[str, str], file: Path) -> None:
    found, expected = fingerprint(model), metadata["base_fingerprint"]
    if found != expected and not _differs_in_rounding(model, metadata):
        base = metadata["base_model"] or "an unnamed model"
        raise ModelError(
            f"{file} was trained on another base model: {base} ({metadata['family']}, weights {expected}). "
            f"This model is {family_of(model)} with weights {found}. Load {base} instead."
        )


def _differs_in_rounding(model: keras.Model, metadata: Mapping[str, str]) -> bool:
    """Returns whether a model and an adapter's base differ only in the rounding of their weights.

    float16 rounds differently from bfloat16, in which fingerprints compare. Where one of the two is float16, sampled
    values are compared instead, with the tolerance of bfloat16, and near zero that of float16.
    """
    values, others = sample_values(model), json.loads(metadata.get("base_values", "{}"))
    if "float16" not in (values["dtype"], others.get("dtype")) or values["paths"] != others.get("paths"):
        return False
    return np.allclose(values["values"], others["values"], rtol=2**-7, atol=2**-24)
