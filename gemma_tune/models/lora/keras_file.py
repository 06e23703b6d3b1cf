"""Reads and writes KerasHub's `.lora.h5` files.

They hold A and B of one rank in Keras's layout, by the number of the layer, and no alpha.
"""

from pathlib import Path

from gemma_tune.errors import ModelError
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.enable import enable_on_layers, layers_with_weights, lora_specs
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.models.lora.layers import scale_of
from gemma_tune.runtime.backend import keras


def save_keras_adapter(model: keras.Model, file: Path) -> None:
    """Writes a model's factors as a `.lora.h5` file. The scale is multiplied into B, since KerasHub reads with scale 1.

    Raises:
        ModelError: The format can't represent the factors.
    """
    layers = lora_layers(model.backbone)
    if problem := _unsupported_by_h5(model):
        raise ModelError(f"{file}: KerasHub's .lora.h5 format holds {problem}. Save as .safetensors instead.")
    file.parent.mkdir(parents=True, exist_ok=True)
    originals = [layer.lora_kernel_b.value for layer in layers]
    try:
        for layer, original in zip(layers, originals, strict=True):
            layer.lora_kernel_b.assign(original * scale_of(layer))
        model.backbone.save_lora_weights(str(file))
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.lora_kernel_b.assign(original)


def _unsupported_by_h5(model: keras.Model) -> str:
    layers, specs = lora_layers(model.backbone), lora_specs(model.backbone).values()
    if any(isinstance(layer, keras.layers.Embedding) for layer in layers):
        return "LoRA on kernels only, not on the embedding"
    if any(spec.layout != "keras" for spec in specs):
        return "factors of lora.layout=keras only"
    if any(spec.use_dora for spec in specs):
        return "no magnitudes, as lora.use_dora needs"
    return "factors of one rank only" if len({spec.rank for spec in specs}) > 1 else ""


def load_keras_adapter(model: keras.Model, file: Path) -> None:
    """Enables LoRA on the layers of a `.lora.h5` file, and loads its factors.

    Raises:
        ModelError: The file can't be read, or doesn't fit the model.
    """
    import h5py

    try:
        with h5py.File(file, "r") as store:
            group = store["lora"]
            rank = int(group["vars"]["rank"][()]) if "vars" in group else int(group["rank"][()])
            indices = sorted(int(name) for name in group if name.isdigit())
    except (OSError, KeyError) as error:
        raise ModelError(f"{file} can't be read as KerasHub LoRA weights: {error}.") from error
    layers = layers_with_weights(model.backbone)
    if not indices or indices[-1] >= len(layers):
        raise ModelError(f"{file} doesn't fit this model: it has factors for layer {indices[-1:]} of {len(layers)}.")
    paths = [layers[index].path for index in indices]
    enable_on_layers(model.backbone, dict.fromkeys(paths, LoraSpec("keras", rank, float(rank))), seed=0)
    try:
        model.backbone.load_lora_weights(str(file))
    except (ValueError, KeyError) as error:
        raise ModelError(f"{file} doesn't fit this model: {error}") from error
