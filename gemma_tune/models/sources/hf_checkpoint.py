"""Reads Hugging Face checkpoints, and GGUF files that look like one, into KerasHub models, tensor by tensor.

KerasHub's own converters know which tensor goes into which variable. In place of KerasHub's loader they get one that
streams.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.family import FAMILIES, family_of_config
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.models.sources.lazy_initialization import fill, fill_whole, lazy_initialization
from gemma_tune.models.sources.preprocessor import keras_tokenizer
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras, keras_hub
from gemma_tune.runtime.json_files import read_json

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class HfStyleCheckpoint(Protocol):
    """A checkpoint with a config.json, and tensors by their Hugging Face names."""

    config: dict[str, Any]

    def rows(self, key: str, start: int, stop: int) -> np.ndarray: ...

    def num_rows(self, key: str) -> int: ...


class SafetensorsCheckpoint:
    """A directory with config.json and safetensors files.

    Raises:
        ModelError: A file is missing or damaged.
    """

    def __init__(self, directory: Path):
        from safetensors import SafetensorError, safe_open

        self.directory = directory
        self.config = read_json(directory / "config.json")
        if (directory / _INDEX).exists():
            names = sorted(set(read_json(directory / _INDEX)["weight_map"].values()))
        else:
            names = [_SINGLE]
        self._files: dict[str, Any] = {}
        for name in names:
            try:
                file = safe_open(directory / name, framework="np")
                self._files.update(dict.fromkeys(file.keys(), file))
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"{directory / name} can't be read as safetensors: {error}. Download it again."
                ) from error

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Returns rows of a tensor in the dtype of the file."""
        return self._slice(key)[start:stop]

    def num_rows(self, key: str) -> int:
        """Returns the length of a tensor's first axis."""
        return self._slice(key).get_shape()[0]

    def _slice(self, key: str) -> Any:
        if key not in self._files:
            raise ModelError(f"{self.directory} has no tensor {key!r}. It holds {len(self._files)} others.")
        return self._files[key].get_slice(key)


class _StreamingLoader:
    """A loader for KerasHub's converters that reads tensors one by one."""

    def __init__(self, checkpoint: HfStyleCheckpoint):
        self._checkpoint = checkpoint

    def get_tensor(self, key: str) -> np.ndarray:
        num_rows = self._checkpoint.num_rows(key)
        if key.endswith("embed_tokens.weight"):
            return np.empty(0)  # The converters only check whether it exists; it may be 2 GB.
        return self._checkpoint.rows(key, 0, num_rows)

    def port_weight(self, keras_variable: keras.Variable, hf_weight_key: str, hook_fn: Any = None) -> None:
        num_rows = self._checkpoint.num_rows(hf_weight_key)
        if hook_fn is not None:
            values = self._checkpoint.rows(hf_weight_key, 0, num_rows)
            try:
                fill_whole(keras_variable, hook_fn(values, list(keras_variable.shape)))
            except ValueError as error:  # The hook can't give the tensor the variable's shape.
                raise ModelError(
                    f"{keras_variable.path} has shape {tuple(keras_variable.shape)}, but {hf_weight_key} "
                    f"{values.shape}."
                ) from error
            return
        if num_rows != keras_variable.shape[0]:
            raise ModelError(
                f"{keras_variable.path} has shape {tuple(keras_variable.shape)}, but {hf_weight_key} has {num_rows} "
                "rows."
            )
        fill(keras_variable, lambda start, stop: self._checkpoint.rows(hf_weight_key, start, stop))


class Port(NamedTuple):
    """A variable and the tensor of a checkpoint that it is read from.

    Attributes:
        value: Keras variable, or the stand-in of a quantized one.
        key: Name of the tensor.
        hook: Function of the tensor and the variable's shape that rearranges the tensor's values as in the variable.
            None: the arrangement is the same.
    """

    value: Any
    key: str
    hook: Any


class _Listing:
    """A loader for KerasHub's converters that loads nothing, and records what they ask for."""

    def __init__(self) -> None:
        self.ports: list[Port] = []

    def get_tensor(self, key: str) -> None:
        """Lets the converters take the first of the name prefixes that they try."""

    def port_weight(self, keras_variable: Any, hf_weight_key: str, hook_fn: Any = None) -> None:
        self.ports.append(Port(keras_variable, hf_weight_key, hook_fn))


def ports(backbone: keras_hub.models.Backbone, config: dict[str, Any]) -> list[Port]:
    """Returns the tensors that a checkpoint of a backbone has, as KerasHub's converter would read them.

    Args:
        backbone: Backbone without LoRA.
        config: Contents of config.json.
    """
    listing = _Listing()
    _converter(config, "The model").convert_weights(backbone, listing, config)
    return listing.ports


def sizes_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of KerasHub's backbone that its converter reads from a config.json."""
    return _converter(config, "The model").convert_backbone_config(_with_global_sizes(config))


def load_backbone(
    checkpoint: HfStyleCheckpoint,
    precision: str,
    where: str,
    quant_spec: QuantSpec | None = None,
    sharding: MeshSharding | None = None,
) -> keras_hub.models.Backbone:
    """Builds the KerasHub backbone that a checkpoint's config describes, and fills it with the checkpoint's values.

    Args:
        checkpoint: Checkpoint to read.
        precision: Keras dtype policy.
        where: Place of the checkpoint, for messages.
        quant_spec: Quantization of the weights while they are read.
        sharding: Mesh sharding to load the weights onto.

    Raises:
        ModelError: The checkpoint is not one of a Gemma, or a tensor is missing or has another shape.
    """
    backbone = build_backbone(checkpoint.config, precision, where, quant_spec, sharding)
    converter = _converter(checkpoint.config, where)
    converter.convert_weights(backbone, _StreamingLoader(checkpoint), checkpoint.config)
    return backbone


def build_backbone(
    config: dict[str, Any],
    precision: str,
    where: str,
    quant_spec: QuantSpec | None = None,
    sharding: MeshSharding | None = None,
) -> keras_hub.models.Backbone:
    """Builds the KerasHub backbone that a config.json describes, without values.

    Vision and audio towers are left out, since gemma_tune trains on text. The arguments are those of `load_backbone`.

    Raises:
        ModelError: The config is not one of a Gemma, or a size is missing.
    """
    converter = _converter(config, where)
    try:
        with lazy_initialization():
            sizes = converter.convert_backbone_config(_with_global_sizes(config))
            sizes.update({name: None for name in ("vision_encoder", "audio_encoder") if name in sizes})
            backbone = converter.backbone_cls(**sizes, dtype=precision)
            if quant_spec:
                quantize_layers(backbone, quant_spec)
            if sharding:
                sharding.place(backbone)
    except KeyError as error:
        raise ModelError(f"{where}: config.json lacks {error}.") from error
    return backbone


def load_hf_tokenizer(directory: Path, config: dict[str, Any]) -> keras_hub.tokenizers.Tokenizer:
    """Makes the KerasHub tokenizer from a directory's tokenizer.model or, if there is none, its tokenizer.json.

    Raises:
        ModelError: Neither file is there, or it can't be read.
    """
    proto = directory / "tokenizer.model"
    family = family_of_config(config, str(directory))
    try:
        if proto.exists():
            return keras_tokenizer(family, proto.read_bytes())
        tokenizer_cls = FAMILIES[family].tokenizer
        return _converter(config, str(directory)).convert_tokenizer(tokenizer_cls, str(directory))
    except FileNotFoundError as error:
        raise ModelError(
            f"{directory} has neither tokenizer.model nor tokenizer.json. Copy one of them there from the base model."
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"The tokenizer in {directory} can't be read: {error}.") from error


def _with_global_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with the sizes of Gemma 4's global attention under the names that KerasHub's converter reads.

    Published checkpoints have `global_head_dim`; transformers 5 saves `per_layer_config` instead, with the differences
    of each layer.
    """
    if "text_config" in config:
        return {**config, "text_config": _with_global_sizes(config["text_config"])}
    if not config.get("per_layer_config"):
        return config
    first_global = config["layer_types"].index("full_attention")
    sizes = config["per_layer_config"].get(str(first_global), {})
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return {**{names[key]: value for key, value in sizes.items() if key in names}, **config}


def _converter(config: dict[str, Any], where: str) -> Any:
    """Returns KerasHub's module that converts checkpoints of a config's family."""
    from keras_hub.src.utils.transformers import convert_gemma, convert_gemma3, convert_gemma4

    converters = {"gemma": convert_gemma, "gemma2": convert_gemma, "gemma3": convert_gemma3, "gemma4": convert_gemma4}
    return converters[family_of_config(config, where)]
