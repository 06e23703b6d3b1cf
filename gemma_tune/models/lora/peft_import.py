"""Loads PEFT adapters into KerasHub models, as factors in PEFT's layout."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.family import family_of, family_of_config
from gemma_tune.models.lora.enable import enable_on_layers
from gemma_tune.models.lora.factors import LoraSpec, factor_shapes
from gemma_tune.models.lora.layers import factors_of
from gemma_tune.models.lora.layouts import from_matrices
from gemma_tune.models.lora.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from gemma_tune.models.lora.peft_names import (
    EMBEDDING,
    LM_HEAD,
    MODULE_PREFIXES,
    TEXT_PREFIX,
    family_in_name,
    layers_by_module,
)
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.json_files import read_json

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|"
    r"lora_embedding_B|base_layer)(?:\.weight)?"
)
_Tensors = dict[str, np.ndarray]  # A module's tensors, by the part of their name after the module.


def is_peft(path: Path) -> bool:
    """Returns whether a path is the directory of a PEFT adapter."""
    return (path / CONFIG_FILE).is_file()


def peft_base(directory: Path) -> str:
    """Returns the base model that a PEFT adapter names, in the form that `load_model` takes.

    Raises:
        ModelError: The adapter names none, or a directory that doesn't exist.
    """
    base = PeftConfig(directory).base_model
    path = Path(base).expanduser()
    for folder in (path, directory.parent / path) if base else ():  # It may be relative to where the adapter was made.
        if folder.is_dir():
            return str(folder)
    if not base or base.startswith(("/", ".", "~")) or "/" not in base:
        what = f"names {base} as its base model, which doesn't exist" if base else "names no base model"
        raise ModelError(
            f"{directory / CONFIG_FILE} {what}. Pass the base model as the model, and {directory} as its adapter."
        )
    return f"hf://{base}"


def load_peft_adapter(model: keras.Model, directory: Path) -> None:
    """Enables LoRA on the layers of a PEFT adapter, and loads its factors.

    Args:
        model: CausalLM, freshly loaded.
        directory: Directory with adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: The adapter can't be read, is of another type, or is for another base model.
    """
    config = PeftConfig(directory)
    check_base_name(model, config.base_model, directory)
    found = _read(directory / WEIGHTS_FILE)
    layers = layers_by_module(model.backbone)
    embedding = _take_embedding(found, layers[EMBEDDING], directory)
    if unknown := [name for module, (name, _) in found.items() if module not in layers]:
        raise ModelError(
            f"{directory} is for another base model: it has factors for {unknown[0]}, but this {family_of(model)} with "
            f"{len(model.backbone.transformer_layers)} decoder blocks has no such module."
        )
    values: dict[str, tuple[LoraSpec, list[np.ndarray]]] = {}
    for module, (name, parts) in found.items():
        values[layers[module].path] = _of_linear(config, layers[module], name, parts, directory)
    if embedding is not None:
        a, b = embedding
        values[layers[EMBEDDING].path] = config.lora_spec(TEXT_PREFIX + EMBEDDING, a.shape[-1]), [a, b]
    _check_all_there(config, found, layers, directory)
    enable_on_layers(model.backbone, {path: lora_spec for path, (lora_spec, _) in values.items()}, seed=0)
    for layer in layers.values():
        if layer.path in values:
            for variable, value in zip(factors_of(layer), values[layer.path][1], strict=True):
                variable.assign(value)


def check_base_name(model: keras.Model, base: str, directory: Path) -> None:
    """Raises ModelError if the base model that an adapter names is, by its name or config.json, of another family."""
    config = Path(base).expanduser() / "config.json" if base else Path()
    said = family_of_config(read_json(config), base) if config.is_file() else family_in_name(base)
    if said and said != family_of(model):
        raise ModelError(
            f"{directory} was trained on another base model, {base}, which is {said}. This model is {family_of(model)}."
        )


def _read(file: Path) -> dict[str, tuple[str, _Tensors]]:
    """Returns (full name, tensors by part) of each module, by its name in `layers_by_module`."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        pickled = file.with_name("adapter_model.bin")
        hint = f" {pickled.name} is a pickle, which could run code: save it as safetensors with PEFT."
        hint = hint if pickled.exists() else ""
        raise ModelError(f"{file.parent} has no {file.name}.{hint}")
    found: dict[str, tuple[str, _Tensors]] = {}
    try:
        with safe_open(file, framework="np") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                match = _KEY.fullmatch(key)
                prefix = next((one for one in MODULE_PREFIXES if match and match["module"].startswith(one)), "")
                if not match:
                    raise ModelError(f"{file} has a tensor {key!r}, which is not a LoRA factor of a Gemma.")
                module = match["module"].removeprefix(prefix)
                parts = found.setdefault(module, (match["module"], {}))[1]
                parts[match["part"]] = opened.get_tensor(key).astype(np.float32)
    except (OSError, SafetensorError, TypeError) as error:
        raise ModelError(f"{file} can't be read as safetensors: {error}.") from error
    if not found:
        raise ModelError(f"{file} holds no LoRA factors.")
    for name, parts in found.values():
        for part, value in parts.items():
            if not np.isfinite(value).all():
                raise ModelError(f"{file} is damaged: {part} of {name} has values that are not finite.")
    return found


def _of_linear(
    config: PeftConfig, layer: Any, name: str, parts: _Tensors, directory: Path
) -> tuple[LoraSpec, list[np.ndarray]]:
    """Returns the spec of a linear layer's factors, and their values in the layer's shapes."""
    a, b, magnitude = (parts.get(part) for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
    if a is None or b is None or a.ndim != 2 or len(parts) > 2 + (magnitude is not None):
        raise ModelError(f"{directory} is damaged: {name} has the tensors {', '.join(sorted(parts))}.")
    lora_spec, kernel = config.lora_spec(name, len(a)), tuple(layer.kernel.shape)
    shapes = factor_shapes(layer.equation, kernel, "peft", lora_spec.rank)
    factors = from_matrices(a, b, shapes.a, shapes.b)
    if factors is None:
        raise ModelError(
            f"{directory} is for another base model: the factors of {name} have shapes {a.shape} and {b.shape}, "
            f"but the kernel of {layer.path} has shape {kernel}."
        )
    if lora_spec.use_dora != (magnitude is not None) or (magnitude is not None and magnitude.size != np.prod(
            shapes.magnitude)):  # fmt: skip
        raise ModelError(f"{directory} is damaged: the magnitudes of {name} don't match use_dora={lora_spec.use_dora}.")
    return lora_spec, [*factors, *([] if magnitude is None else [magnitude.reshape(shapes.magnitude)])]


def _take_embedding(
    found: dict[str, tuple[str, _Tensors]], layer: Any, directory: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """Removes the factors of embedding and LM head from `found`, and returns those of the tied embedding, or None."""
    parts = {name: found.pop(name)[1] for name in (EMBEDDING, LM_HEAD) if name in found}
    if not parts:
        return None
    of_rows, of_head = parts.get(EMBEDDING, {}), parts.get(LM_HEAD, {})
    for values in (of_rows, of_head):  # PEFT also saves the whole embedding beside the factors.
        saved = values.pop("base_layer", None)
        if saved is not None and not _is_same(saved, layer):
            raise ModelError(f"{directory} also holds an embedding, which differs from this model's.")
    a, b = of_rows.get("lora_embedding_A"), of_rows.get("lora_embedding_B")
    head_a, head_b = of_head.get("lora_A"), of_head.get("lora_B")
    if a is not None and b is not None and head_a is not None and head_b is not None and len(of_rows | of_head) == 4:
        is_one = np.array_equal(a, head_b.T) and np.array_equal(b, head_a.T)
        if is_one:
            return a.T, b.T
    raise ModelError(
        f"{directory} has factors for {' and '.join(parts)}. Gemma's {EMBEDDING} and {LM_HEAD} are one tied matrix, so "
        "that both must have the same factors."
    )


def _is_same(saved: np.ndarray, layer: Any) -> bool:
    if saved.shape != (layer.input_dim, layer.output_dim):
        return False
    rows = min(256, len(saved))
    held = getattr(layer, "first_floats", None)
    ours = held if held is not None else np.asarray(layer._embeddings.value[:rows], np.float32).ravel()
    return np.allclose(saved[:rows].ravel()[: ours.size], ours, rtol=2**-7, atol=2**-24)


def _check_all_there(
    config: PeftConfig, found: dict[str, tuple[str, _Tensors]], layers: dict[str, Any], directory: Path
) -> None:
    """Raises ModelError if factors are missing for a module of the model, as in an adapter for fewer decoder blocks."""
    prefix = next((name.removesuffix(module) for module, (name, _) in found.items()), TEXT_PREFIX)
    others = [module for module in layers if module not in found and module != EMBEDDING]
    missing = [module for module in others if config.targets(prefix + module)]
    if missing:
        raise ModelError(
            f"{directory} is for another base model, or damaged: it lacks the factors of {missing[0]} and "
            f"{len(missing) - 1} other modules, which its settings name."
        )
