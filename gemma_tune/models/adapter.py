"""Saves and loads LoRA adapters: as safetensors with what they belong to, and as KerasHub's `.lora.h5`."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.files import write_whole
from gemma_tune.keras_runtime import keras
from gemma_tune.models.family import family_of
from gemma_tune.models.fingerprint import fingerprint, some_values
from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.lora import enable_lora, enable_on_layers, lora_layers
from gemma_tune.processes import to_host

ADAPTER_FILE = "adapter.safetensors"
_FORMAT = "gemma_tune.adapter"


def save_adapter(model: keras.Model, path: str | os.PathLike, base_model: str = "") -> Path:
    """Writes the LoRA factors alone.

    Args:
        model: A CausalLM with LoRA on.
        path: A directory, in which `adapter.safetensors` is written, or a file ending in `.safetensors` or `.lora.h5`.
        base_model: How the base is named, so that the adapter can say so.

    Returns:
        The file written.

    Raises:
        ModelError: The model has no LoRA factors.
    """
    layers = lora_layers(model.backbone)
    if not layers:
        raise ModelError(
            "The model has no LoRA factors to save. Train it with training.method=lora, or call enable_lora first."
        )
    path = Path(path)
    if path.name.endswith(".lora.h5"):
        _save_keras(model, path)
        return path
    file = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save

    factors = {name: to_host(variable.value) for name, variable in _factors(model).items()}
    metadata = {
        "format": _FORMAT,
        "family": family_of(model),
        "base_model": base_model,
        "base_fingerprint": fingerprint(model),
        "base_values": json.dumps(some_values(model)),
        "rank": str(layers[0].lora_rank),
        "alpha": repr(float(layers[0].lora_alpha)),
        "target_layers": json.dumps(sorted({layer.name for layer in layers})),
    }
    write_whole(file, lambda partial: partial.write_bytes(save(factors, sealed_metadata(metadata, factors))))
    return file


def sealed_metadata(metadata: dict[str, str], factors: dict[str, np.ndarray]) -> dict[str, str]:
    """Returns an adapter's metadata with a SHA-256 over all that its file holds, but for the sum itself."""
    described = {name: value for name, value in metadata.items() if name != "sha256"}
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(factors):
        factor = np.ascontiguousarray(factors[name])
        found.update(f"{name} {factor.dtype} {factor.shape}".encode())
        found.update(factor.tobytes())
    return {**described, "sha256": found.hexdigest()}


def load_adapter(model: keras.Model, path: str | os.PathLike) -> None:
    """Enables LoRA on a freshly loaded base model and fills in an adapter's factors.

    Args:
        model: The CausalLM that the adapter was trained on.
        path: What `save_adapter` wrote or was given, or KerasHub's `.lora.h5`.

    Raises:
        ModelError: No adapter there, damaged, or for another base; says which.
    """
    path = Path(path)
    file = path / ADAPTER_FILE if path.is_dir() else path
    if not file.exists():
        raise ModelError(f"There is no adapter at {file}.")
    if file.name.endswith(".lora.h5"):
        _load_keras(model, file)
        return
    metadata, factors = _read(file)
    _check_base(model, metadata, file)
    targets = json.loads(metadata["target_layers"])
    enable_lora(model.backbone, int(metadata["rank"]), float(metadata["alpha"]), targets, seed=0)
    variables = _factors(model)
    if set(variables) != set(factors):
        raise ModelError(
            f"{file} and the model don't have the same factors: {sorted(set(variables) ^ set(factors))[:4]}."
        )
    for name, variable in variables.items():
        if tuple(variable.shape) != factors[name].shape:
            raise ModelError(f"{file}: {name} is {factors[name].shape}, and the model's is {tuple(variable.shape)}.")
    for name, variable in variables.items():
        variable.assign(factors[name])


def read_adapter_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Returns what an adapter says of itself: family, base_model, base_fingerprint, rank, alpha, target_layers."""
    path = Path(path)
    return _read(path / ADAPTER_FILE if path.is_dir() else path)[0]


def _factors(model: keras.Model) -> dict[str, keras.Variable]:
    return {path: variable for path, variable in variables_by_path(model).items() if "lora_" in path.rsplit("/", 1)[-1]}


def _read(file: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            factors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} can't be read as an adapter: {error}.") from error
    if metadata.get("format") != _FORMAT:
        raise ModelError(f"{file} is no adapter of gemma_tune: its metadata has format {metadata.get('format')!r}.")
    if problem := _what_is_wrong(metadata, factors):
        raise ModelError(f"{file} is damaged: {problem}. Take it from its source again.")
    return metadata, factors


def _what_is_wrong(metadata: dict[str, str], factors: dict[str, np.ndarray]) -> str:
    for name in ("family", "base_model", "base_fingerprint", "base_values", "rank", "alpha", "target_layers"):
        if name not in metadata:
            return f"its metadata has no {name}"
    try:
        rank, alpha, targets = int(metadata["rank"]), float(metadata["alpha"]), json.loads(metadata["target_layers"])
        json.loads(metadata["base_values"])
    except (ValueError, RecursionError) as error:
        return f"its metadata can't be read: {error}"
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if rank < 1 or not 0 < alpha < math.inf or not is_list:
        return f"its metadata says rank={rank}, alpha={alpha}, target_layers={targets!r:.80}"
    if metadata.get("sha256") not in (None, sealed_metadata(metadata, factors)["sha256"]):
        return "its bytes are not those that were written"
    for name, factor in factors.items():
        if rank not in factor.shape or not np.issubdtype(factor.dtype, np.floating):
            return f"its factor {name} is {factor.dtype} {factor.shape}, which is none of rank {rank}"
        if not np.isfinite(factor).all():
            return f"its factor {name} holds values that are no numbers"
    return ""


def _check_base(model: keras.Model, metadata: dict[str, str], file: Path) -> None:
    found, expected = fingerprint(model), metadata["base_fingerprint"]
    if found != expected and not _is_rounded_otherwise(model, metadata):
        base = metadata["base_model"] or "an unnamed model"
        raise ModelError(
            f"{file} was trained on another base: {base} ({metadata['family']}, weights {expected}); this model is "
            f"{family_of(model)} with weights {found}. Load {base} instead."
        )


def _is_rounded_otherwise(model: keras.Model, metadata: dict[str, str]) -> bool:
    """Whether the base is the same but for the rounding of its weights.

    float16 rounds at other places than bfloat16, in which fingerprints compare. Where one of the two bases is float16,
    some values are compared instead, with the tolerance of bfloat16, and of float16 near zero.
    """
    values, others = some_values(model), json.loads(metadata.get("base_values", "{}"))
    if "float16" not in (values["dtype"], others.get("dtype")) or values["paths"] != others.get("paths"):
        return False
    return np.allclose(values["values"], others["values"], rtol=2**-7, atol=2**-24)


def _save_keras(model: keras.Model, file: Path) -> None:
    """Writes KerasHub's format, which has no alpha: the scale alpha / rank goes into B, so that it reads right with
    scale 1.
    """
    layers = lora_layers(model.backbone)
    if any(not hasattr(layer, "lora_kernel_b") for layer in layers):
        raise ModelError(
            f"{file}: KerasHub's .lora.h5 holds LoRA on kernels only, not on the embedding. Save as .safetensors."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    originals = [layer.lora_kernel_b.value for layer in layers]
    try:
        for layer, original in zip(layers, originals, strict=True):
            layer.lora_kernel_b.assign(original * (layer.lora_alpha / layer.lora_rank))
        model.backbone.save_lora_weights(str(file))
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.lora_kernel_b.assign(original)


def _load_keras(model: keras.Model, file: Path) -> None:
    import h5py

    try:
        with h5py.File(file, "r") as store:
            group = store["lora"]
            rank = int(group["vars"]["rank"][()]) if "vars" in group else int(group["rank"][()])
            indices = sorted(int(name) for name in group if name.isdigit())
    except (OSError, KeyError) as error:
        raise ModelError(f"{file} can't be read as KerasHub LoRA weights: {error}.") from error
    enable_on_layers(model.backbone, indices, rank, float(rank), seed=0)
    try:
        model.backbone.load_lora_weights(str(file))
    except (ValueError, KeyError) as error:
        raise ModelError(f"{file} doesn't fit this model: {error}") from error
