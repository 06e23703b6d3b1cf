"""Saves models as Keras presets, and records how the layers of a quantized model are held.

The preset is KerasHub's. The codes of quantized layers are among its weights as they are, and `quantization.json`
beside them says, layer by layer, how to read them.
"""

import json
import os
from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.quantization.spec import LayerScheme, QuantSpec
from gemma_tune.runtime.atomic_files import CHECKSUMS, find_damage
from gemma_tune.runtime.atomic_folder import atomic_folder, check_output
from gemma_tune.runtime.backend import keras, without_tensorflow
from gemma_tune.runtime.json_files import read_json

_FILE = "quantization.json"
_FORMAT = "gemma_tune.quantization"


def save_preset(model: keras.Model, directory: str | os.PathLike, overwrite: bool = False) -> Path:
    """Writes a model, quantized or not, as a preset from which `load_model` makes the same model, code by code.

    Args:
        model: CausalLM without LoRA.
        directory: Folder of the preset.
        overwrite: Whether a folder of that name is replaced. False: it must not exist, or be empty.

    Returns:
        The path of the folder.

    Raises:
        ModelError: The directory holds something, or the model has LoRA factors.
        OSError: The preset can't be written; nothing is left behind.
    """
    path = Path(directory).expanduser() if overwrite else check_output(directory)
    if lora_layers(model.backbone):
        raise ModelError("The model has LoRA factors: save these with save_adapter, or merge them.")
    with atomic_folder(path, replace=overwrite, checksums=True) as folder:
        with without_tensorflow():
            model.save_to_preset(str(folder))
        schemes = {layer.path: _to_plain(layer.scheme) for layer in quantized_layers(model.backbone)}
        if schemes:
            text = json.dumps({"format": _FORMAT, "layers": schemes}, indent=1)
            (folder / _FILE).write_text(text, encoding="utf-8")
    return path


def check_undamaged(directory: Path) -> None:
    """Raises ModelError if a preset that `save_preset` wrote is damaged. Presets of others have no checksums."""
    if (directory / CHECKSUMS).exists() and (problem := find_damage(directory)):
        raise ModelError(
            f"{directory} is damaged: {problem}. Get it from its source again; or, if it was changed on purpose, "
            f"remove its {CHECKSUMS}."
        )


def read_schemes(directory: Path) -> dict[str, LayerScheme]:
    """Returns the scheme of each quantized layer of a preset, by the layer's path; {} if no layer is quantized.

    Raises:
        ModelError: The file of the schemes can't be read.
    """
    file = directory / _FILE
    if not file.exists():
        return {}
    tree = read_json(file)
    if tree.get("format") != _FORMAT:
        raise ModelError(f"{file} has the format {tree.get('format')!r}, expected {_FORMAT!r}.")
    try:
        return {path: _from_plain(dict(one)) for path, one in tree["layers"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {type(error).__name__}: {error}.") from error


def _from_plain(values: dict) -> LayerScheme:
    """Reads one layer's entry; earlier versions called `quant_spec` `grid`."""
    name = "quant_spec" if "quant_spec" in values else "grid"
    return LayerScheme(QuantSpec(**values.pop(name)), **values)


def _to_plain(scheme: LayerScheme) -> dict:
    return {**scheme._asdict(), "quant_spec": scheme.quant_spec._asdict()}
