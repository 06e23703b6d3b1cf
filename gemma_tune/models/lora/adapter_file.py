"""Reads and writes adapter files: LoRA factors in safetensors, with metadata of their kind and their base model.

Older files lack `layout`, `use_rslora` and `use_dora`: they have Keras's layout, and neither rsLoRA nor DoRA. `layers`,
a map from layer path to [rank, alpha], is there where these differ between layers, or where only some of the layers
with a target's name have factors.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma_tune.config_checks import LORA_LAYOUTS
from gemma_tune.errors import ModelError
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.runtime.atomic_files import write_atomically
from gemma_tune.runtime.safetensors_file import write_safetensors

ADAPTER_FORMAT = "gemma_tune.adapter"
_REQUIRED = ("family", "base_model", "base_fingerprint", "base_values", "rank", "alpha", "target_layers")
Metadata = dict[str, str]
FactorArrays = dict[str, np.ndarray]


def write_adapter(file: Path, metadata: Metadata, factors: FactorArrays) -> None:
    """Writes an adapter atomically. Equal adapters are equal byte for byte."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sealed = sealed_metadata({"format": ADAPTER_FORMAT, **metadata}, factors)
    write_atomically(file, lambda partial: write_safetensors(partial, factors, sealed))


def sealed_metadata(metadata: Metadata, factors: FactorArrays) -> Metadata:
    """Returns an adapter's metadata with a SHA-256 checksum of everything else that its file holds."""
    described = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(factors):
        factor = np.ascontiguousarray(factors[name])
        digest.update(f"{name} {factor.dtype} {factor.shape}".encode())
        digest.update(factor.tobytes())
    return {**described, "sha256": digest.hexdigest()}


def read_adapter(file: Path) -> tuple[Metadata, FactorArrays]:
    """Returns an adapter's metadata and factors.

    Raises:
        ModelError: The file can't be read, is not an adapter, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            factors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} can't be read as an adapter: {error}.") from error
    if metadata.get("format") != ADAPTER_FORMAT:
        raise ModelError(
            f"{file} is not an adapter of gemma_tune: its metadata has the format {metadata.get('format')!r}."
        )
    if problem := _problem_in(metadata, factors):
        raise ModelError(f"{file} is damaged: {problem}. Copy it from its source again.")
    return metadata, factors


def lora_metadata(lora_specs: Mapping[str, LoraSpec], targets: Mapping[str, str]) -> Metadata:
    """Returns the metadata of the kind of LoRA factors.

    Args:
        lora_specs: Spec of each layer with factors, by path.
        targets: Name of each layer whose name is that of a layer with factors, by path.
    """
    first = next(iter(lora_specs.values()))
    described = {
        "rank": str(first.rank),
        "alpha": repr(float(first.alpha)),
        "target_layers": json.dumps(sorted(set(targets.values()))),
        "layout": first.layout,
        "use_rslora": json.dumps(first.use_rslora),
        "use_dora": json.dumps(first.use_dora),
    }
    if set(targets) != set(lora_specs) or len({(one.rank, one.alpha) for one in lora_specs.values()}) > 1:
        described["layers"] = json.dumps({path: [one.rank, float(one.alpha)] for path, one in lora_specs.items()})
    return described


def specs_in_metadata(metadata: Metadata) -> tuple[LoraSpec, dict[str, LoraSpec]]:
    """Returns the spec of all factors, and where layers differ, the spec of each by path."""
    layout, *flags = (metadata.get(name) for name in ("layout", "use_rslora", "use_dora"))
    use_rslora, use_dora = (json.loads(flag or "false") for flag in flags)
    common = LoraSpec(layout or "keras", int(metadata["rank"]), float(metadata["alpha"]), use_rslora, use_dora)
    layers = json.loads(metadata.get("layers", "{}"))
    return common, {path: common._replace(rank=rank, alpha=alpha) for path, (rank, alpha) in layers.items()}


def _problem_in(metadata: Metadata, factors: FactorArrays) -> str:
    for name in _REQUIRED:
        if name not in metadata:
            return f"its metadata has no {name}"
    try:
        common, layers = specs_in_metadata(metadata)
        targets = json.loads(metadata["target_layers"])
        json.loads(metadata["base_values"])
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        return f"its metadata can't be read: {error}"
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not is_list or not all(_is_valid(one) for one in (common, *layers.values())):
        return f"its metadata has rank={common.rank}, alpha={common.alpha}, target_layers={targets!r:.80}"
    if metadata.get("sha256") not in (None, sealed_metadata(metadata, factors)["sha256"]):
        return "its contents don't match its checksum"
    ranks = {common.rank, *(one.rank for one in layers.values())}
    for name, factor in factors.items():
        is_factor = name.endswith("_magnitude") or ranks & set(factor.shape)
        if not is_factor or not np.issubdtype(factor.dtype, np.floating):
            return f"its factor {name} is {factor.dtype} {factor.shape}, which doesn't fit rank {common.rank}"
        if not np.isfinite(factor).all():
            return f"its factor {name} has values that are not finite"
    return ""


def _is_valid(lora_spec: LoraSpec) -> bool:
    layout, rank, alpha, *flags = lora_spec
    numbers = isinstance(rank, int) and isinstance(alpha, (int, float)) and rank >= 1 and 0 < alpha < math.inf
    return numbers and layout in LORA_LAYOUTS and all(isinstance(flag, bool) for flag in flags)
