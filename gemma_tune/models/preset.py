"""Saves models as Keras presets, and says how the layers of a quantized one are held.

The preset is KerasHub's; codes stand among its weights as they are, and `quantization.json` beside them says, layer
by layer, how they are to be read. It is written to a folder with another name first, so that a half-written preset
never has the name of a whole one.
"""

import json
import os
import shutil
from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.quantization.spec import LayerScheme, QuantSpec
from gemma_tune.runtime.atomic_files import CHECKSUMS, find_damage, write_checksums
from gemma_tune.runtime.backend import keras, without_tensorflow
from gemma_tune.runtime.json_files import read_json

_FILE = "quantization.json"
_FORMAT = "gemma_tune.quantization"


def check_output(directory: str | os.PathLike) -> Path:
    """Returns the folder that a preset may be written to.

    Raises:
        ModelError: There is something already.
    """
    path = Path(directory).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f"{path} exists already. Name another output, or remove it.")
    return path


def save_preset(model: keras.Model, directory: str | os.PathLike) -> Path:
    """Writes a model, quantized or not, from which `load_model` makes the same again, code by code.

    Args:
        model: A CausalLM without LoRA.
        directory: Must not exist, or be empty.

    Returns:
        The directory.

    Raises:
        ModelError: The directory holds something, or there are LoRA factors.
    """
    path = check_output(directory)
    if lora_layers(model.backbone):
        raise ModelError("The model has LoRA factors: save these with save_adapter, or merge them.")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with without_tensorflow():
            model.save_to_preset(str(partial))
        schemes = {layer.path: _to_plain(layer.scheme) for layer in quantized_layers(model.backbone)}
        if schemes:
            text = json.dumps({"format": _FORMAT, "layers": schemes}, indent=1)
            (partial / _FILE).write_text(text, encoding="utf-8")
        write_checksums(partial)
        if path.exists():
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def check_undamaged(directory: Path) -> None:
    """Raises ModelError if a preset that `save_preset` wrote isn't as it was; those of others have no checksums."""
    if (directory / CHECKSUMS).exists() and (problem := find_damage(directory)):
        raise ModelError(
            f"{directory} is damaged: {problem}. Take it from its source again; or, if it was changed on purpose, "
            f"remove its {CHECKSUMS}."
        )


def read_schemes(directory: Path) -> dict[str, LayerScheme]:
    """Returns how each quantized layer of a preset is held, by path; {} where none is.

    Raises:
        ModelError: The file can't be read.
    """
    file = directory / _FILE
    if not file.exists():
        return {}
    tree = read_json(file)
    if tree.get("format") != _FORMAT:
        raise ModelError(f"{file} is of another format: {tree.get('format')!r}.")
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
