"""Puts an adapter that PEFT wrote on a KerasHub model, as factors of PEFT's layout."""

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
from gemma_tune.models.lora.peft_names import EMBEDDING, HEAD, PREFIXES, TEXT, family_in_name, modules
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.json_files import read_json

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|"
    r"lora_embedding_B|base_layer)(?:\.weight)?"
)
Parts = dict[str, np.ndarray]


def is_peft(path: Path) -> bool:
    """Whether a path is a directory that PEFT, or something like it, wrote."""
    return (path / CONFIG_FILE).is_file()


def peft_base(directory: Path) -> str:
    """Returns the model that a PEFT adapter says it was trained on, as `load_model` names it.

    Raises:
        ModelError: It doesn't say.
    """
    base = PeftConfig(directory).base_model
    is_path = base.startswith(("/", ".", "~"))
    if not base or (is_path and not Path(base).expanduser().is_dir()):
        what = f"names {base} as its base model, which isn't there" if base else "doesn't say its base model"
        raise ModelError(f"{directory / CONFIG_FILE} {what}. Name that as the model, and {directory} as its adapter.")
    return base if Path(base).expanduser().is_dir() else f"hf://{base}"


def load_peft_adapter(model: keras.Model, directory: Path) -> None:
    """Enables LoRA where a PEFT adapter has it, and fills in its factors.

    Args:
        model: A CausalLM, freshly loaded.
        directory: With adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: It can't be read, is of another type, or is for another base; says which.
    """
    config = PeftConfig(directory)
    check_base_name(model, config.base_model, directory)
    found = _read(directory / WEIGHTS_FILE)
    layers = modules(model.backbone)
    embedding = _take_embedding(found, layers[EMBEDDING], directory)
    if unknown := [name for module, (name, _) in found.items() if module not in layers]:
        raise ModelError(
            f"{directory} is for another base: it has factors for {unknown[0]}, and the model, a {family_of(model)} of "
            f"{len(model.backbone.transformer_layers)} blocks, has no such module."
        )
    values: dict[str, tuple[LoraSpec, list[np.ndarray]]] = {}
    for module, (name, parts) in found.items():
        values[layers[module].path] = _of_linear(config, layers[module], name, parts, directory)
    if embedding is not None:
        a, b = embedding
        values[layers[EMBEDDING].path] = config.lora_spec(TEXT + EMBEDDING, a.shape[-1]), [a, b]
    _check_all_there(config, found, layers, directory)
    enable_on_layers(model.backbone, {path: lora_spec for path, (lora_spec, _) in values.items()}, seed=0)
    for layer in layers.values():
        if layer.path in values:
            for variable, value in zip(factors_of(layer), values[layer.path][1], strict=True):
                variable.assign(value)


def check_base_name(model: keras.Model, base: str, directory: Path) -> None:
    """Raises ModelError if what an adapter names as its base is, by its name or its config.json, another family."""
    config = Path(base).expanduser() / "config.json" if base else Path()
    said = family_of_config(read_json(config), base) if config.is_file() else family_in_name(base)
    if said and said != family_of(model):
        raise ModelError(
            f"{directory} was trained on another base: {base}, a {said}; this model is a {family_of(model)}."
        )


def _read(file: Path) -> dict[str, tuple[str, Parts]]:
    """Returns module, as `peft_names.modules` calls it -> (its full name, its tensors by their part)."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        pickled = file.with_name("adapter_model.bin")
        hint = f" {pickled.name} is a pickle, which could run code: have PEFT save it as safetensors."
        hint = hint if pickled.exists() else ""
        raise ModelError(f"{file.parent} has no {file.name}.{hint}")
    found: dict[str, tuple[str, Parts]] = {}
    try:
        with safe_open(file, framework="np") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                match = _KEY.fullmatch(key)
                prefix = next((one for one in PREFIXES if match and match["module"].startswith(one)), "")
                if not match:
                    raise ModelError(f"{file} has a tensor {key!r}, which is no LoRA factor of a Gemma.")
                module = match["module"].removeprefix(prefix)
                parts = found.setdefault(module, (match["module"], {}))[1]
                parts[match["part"]] = opened.get_tensor(key).astype(np.float32)
    except (OSError, SafetensorError, TypeError) as error:
        raise ModelError(f"{file} can't be read as safetensors: {error}.") from error
    if not found:
        raise ModelError(f"{file} holds no factors.")
    for name, parts in found.values():
        for part, value in parts.items():
            if not np.isfinite(value).all():
                raise ModelError(f"{file} is damaged: {part} of {name} holds values that are no numbers.")
    return found


def _of_linear(
    config: PeftConfig, layer: Any, name: str, parts: Parts, directory: Path
) -> tuple[LoraSpec, list[np.ndarray]]:
    """Returns what a linear layer's factors are, and their values in their shapes."""
    a, b, magnitude = (parts.get(part) for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
    if a is None or b is None or a.ndim != 2 or len(parts) > 2 + (magnitude is not None):
        raise ModelError(f"{directory} is damaged: {name} has {', '.join(sorted(parts))}.")
    lora_spec, kernel = config.lora_spec(name, len(a)), tuple(layer.kernel.shape)
    shapes = factor_shapes(layer.equation, kernel, "peft", lora_spec.rank)
    factors = from_matrices(a, b, shapes.a, shapes.b)
    if factors is None:
        raise ModelError(
            f"{directory} is for another base: the factors of {name} are {a.shape} and {b.shape}, and the model's "
            f"{layer.path} is {kernel}."
        )
    if lora_spec.use_dora != (magnitude is not None) or (magnitude is not None and magnitude.size != np.prod(
            shapes.magnitude)):  # fmt: skip
        raise ModelError(f"{directory} is damaged: {name} has no magnitudes that fit use_dora={lora_spec.use_dora}.")
    return lora_spec, [*factors, *([] if magnitude is None else [magnitude.reshape(shapes.magnitude)])]


def _take_embedding(
    found: dict[str, tuple[str, Parts]], layer: Any, directory: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """Takes the factors of embedding and head from what was found, and returns them as those of the tied embedding."""
    parts = {name: found.pop(name)[1] for name in (EMBEDDING, HEAD) if name in found}
    if not parts:
        return None
    of_rows, of_head = parts.get(EMBEDDING, {}), parts.get(HEAD, {})
    for values in (of_rows, of_head):  # PEFT also saves the whole embedding beside its factors.
        saved = values.pop("base_layer", None)
        if saved is not None and not _is_same(saved, layer):
            raise ModelError(f"{directory} also holds an embedding, which isn't that of this model.")
    a, b = of_rows.get("lora_embedding_A"), of_rows.get("lora_embedding_B")
    head_a, head_b = of_head.get("lora_A"), of_head.get("lora_B")
    if a is not None and b is not None and head_a is not None and head_b is not None and len(of_rows | of_head) == 4:
        is_one = np.array_equal(a, head_b.T) and np.array_equal(b, head_a.T)
        if is_one:
            return a.T, b.T
    raise ModelError(
        f"{directory} has factors for {' and '.join(parts)}. In Gemma {EMBEDDING} and {HEAD} are one matrix, so both "
        "would need the same ones."
    )


def _is_same(saved: np.ndarray, layer: Any) -> bool:
    if saved.shape != (layer.input_dim, layer.output_dim):
        return False
    rows = min(256, len(saved))
    held = getattr(layer, "_first_floats", None)
    ours = held if held is not None else np.asarray(layer._embeddings.value[:rows], np.float32).ravel()
    return np.allclose(saved[:rows].ravel()[: ours.size], ours, rtol=2**-7, atol=2**-24)


def _check_all_there(
    config: PeftConfig, found: dict[str, tuple[str, Parts]], layers: dict[str, Any], directory: Path
) -> None:
    """An adapter of a model with fewer blocks fits as far as it goes."""
    prefix = next((name.removesuffix(module) for module, (name, _) in found.items()), TEXT)
    others = [module for module in layers if module not in found and module != EMBEDDING]
    missing = [module for module in others if config.targets(prefix + module)]
    if missing:
        raise ModelError(
            f"{directory} is for another base, or damaged: its settings ask for factors of {missing[0]} and "
            f"{len(missing) - 1} other modules of this model, and it has none for them."
        )
