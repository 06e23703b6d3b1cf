"""Loads Keras presets: KerasHub builds the model, without random weights first and without vision and audio towers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_tune.errors import ModelError
from gemma_tune.models.family import FAMILIES, family_of
from gemma_tune.models.preset import check_undamaged, read_schemes
from gemma_tune.models.quantized.convert import apply_schemes, quantize_layers
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.models.sources.download import first_line, is_network_error, no_network
from gemma_tune.models.sources.lazy_initialization import lazy_initialization
from gemma_tune.models.sources.source import Source
from gemma_tune.models.sources.tokenizer import TextTokenizer
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras_hub, without_tensorflow


def load_keras_preset(
    source: Source, precision: str, quant_spec: QuantSpec | None, sharding: MeshSharding | None
) -> tuple[keras_hub.models.Backbone, keras_hub.tokenizers.Tokenizer]:
    """Loads the backbone and the tokenizer of a Keras preset.

    Args:
        source: Directory of a preset, or the name of one that is downloaded.
        precision: Keras dtype policy.
        quant_spec: Quantization of the weights while they are read. None: as the preset holds them.
        sharding: Mesh sharding to load the weights onto. None: one device.

    Raises:
        ModelError: The preset is damaged, is not one of a Gemma, or can't be downloaded.
    """
    if source.kind == "keras":
        check_undamaged(Path(source.value))
    with _keras_errors(source), without_tensorflow():
        loader = _preset_loader(source)
        with lazy_initialization():
            backbone = _build_backbone(loader, precision)
            if source.kind == "keras":
                apply_schemes(backbone, read_schemes(Path(source.value)))
            if quant_spec:
                quantize_layers(backbone, quant_spec)
            if sharding:
                sharding.place(backbone)
                sharding.assign_shards(backbone)
        tokenizer_cls = FAMILIES[family_of(backbone)].tokenizer
        loader._load_backbone_weights(backbone)
        return backbone, loader.load_tokenizer(tokenizer_cls)


def load_keras_preset_tokenizer(source: Source) -> tuple[TextTokenizer, str]:
    """Returns the tokenizer of a Keras preset and the name of its family, without reading the weights.

    Raises:
        ModelError: As `load_keras_preset`.
    """
    with _keras_errors(source), without_tensorflow():
        loader = _preset_loader(source)
        with lazy_initialization():
            family = family_of(_build_backbone(loader, "float32"))
        return TextTokenizer(loader.load_tokenizer(FAMILIES[family].tokenizer).proto), family


def build_keras_preset(directory: Path, precision: str) -> keras_hub.models.Backbone:
    """Builds the backbone of a Keras preset in a directory, quantized as it is there, without values.

    Call it within `lazy_initialization`.

    Raises:
        ModelError: The preset is damaged, or is not one of a Gemma.
    """
    check_undamaged(directory)
    source = Source("keras", str(directory))
    with _keras_errors(source), without_tensorflow():
        backbone = _build_backbone(_preset_loader(source), precision)
        apply_schemes(backbone, read_schemes(directory))
    return backbone


def _preset_loader(source: Source) -> Any:
    from keras_hub.src.utils.preset_utils import get_preset_loader

    return get_preset_loader(source.value)


def _build_backbone(loader: Any, precision: str) -> keras_hub.models.Backbone:
    config = loader.config["config"]
    towers = {name: None for name in ("vision_encoder", "audio_encoder") if config.get(name) is not None}
    return loader.load_backbone(loader.check_backbone_class(), load_weights=False, dtype=precision, **towers)


@contextlib.contextmanager
def _keras_errors(source: Source) -> Iterator[None]:
    """Turns what Keras, h5py, kagglehub and requests raise, each in its own way, into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_error_message(source, error)) from error


def _error_message(source: Source, error: Exception) -> str:
    reason = first_line(error)
    if source.kind == "keras":
        return f"{source.value} can't be read as a Keras preset: {reason}"
    if is_network_error(error):
        return no_network(source.value, "kaggle.com", error)
    needs_consent = any(word in str(error) for word in ("403", "401", "gated", "not accessible", "onsent", "redential"))
    advice = (
        "Accept the model's terms on its page at kaggle.com/models, create an API token (kaggle.com/settings) and set "
        "KAGGLE_USERNAME and KAGGLE_KEY, or save the token as ~/.kaggle/kaggle.json."
    )
    if not needs_consent:
        advice = f"Check the network and the name. {advice}"
    return f"{source.value} can't be downloaded from Kaggle: {reason} {advice}"
