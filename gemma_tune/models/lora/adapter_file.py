"""The file of an adapter: safetensors, with metadata that says what the factors are and what they belong to.

Files without `layout`, `use_rslora` and `use_dora` are older than these: of Keras's layout, with neither. `layers` is
there where ranks or alphas differ, or where not all layers of a name have factors: layer path -> [rank, alpha].
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
_NEEDED = ("family", "base_model", "base_fingerprint", "base_values", "rank", "alpha", "target_layers")
Metadata = dict[str, str]
Factors = dict[str, np.ndarray]


def write_adapter(file: Path, metadata: Metadata, factors: Factors) -> None:
    """Writes an adapter atomically. Equal adapters are equal byte for byte."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sealed = sealed_metadata({"format": ADAPTER_FORMAT, **metadata}, factors)
    write_atomically(file, lambda partial: write_safetensors(partial, factors, sealed))


def sealed_metadata(metadata: Metadata, factors: Factors) -> Metadata:
    """Returns an adapter's metadata with a SHA-256 over all that its file holds, but for the sum itself."""
    described = {name: value for name, value in metadata.items() if name != "sha256"}
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(factors):
        factor = np.ascontiguousarray(factors[name])
        found.update(f"{name} {factor.dtype} {factor.shape}".encode())
        found.update(factor.tobytes())
    return {**described, "sha256": found.hexdigest()}


def read_adapter(file: Path) -> tuple[Metadata, Factors]:
    """Returns an adapter's metadata and factors.

    Raises:
        ModelError: It can't be read, is none, or is damaged; says how.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            factors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} can't be read as an adapter: {error}.") from error
    if metadata.get("format") != ADAPTER_FORMAT:
        raise ModelError(f"{file} is no adapter of gemma_tune: its metadata has format {metadata.get('format')!r}.")
    if problem := _what_is_wrong(metadata, factors):
        raise ModelError(f"{file} is damaged: {problem}. Take it from its source again.")
    return metadata, factors


def describe(lora_specs: Mapping[str, LoraSpec], targets: Mapping[str, str]) -> Metadata:
    """Returns the part of the metadata that says what the factors are.

    Args:
        low_ranks: Of each layer with factors, by path.
        targets: The names of all layers that have the name of one of them, by path.
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


def described_factors(metadata: Metadata) -> tuple[LoraSpec, dict[str, LoraSpec]]:
    """Returns what the factors of all layers are, and those of each by path where they are not all alike."""
    layout, *flags = (metadata.get(name) for name in ("layout", "use_rslora", "use_dora"))
    use_rslora, use_dora = (json.loads(flag or "false") for flag in flags)
    common = LoraSpec(layout or "keras", int(metadata["rank"]), float(metadata["alpha"]), use_rslora, use_dora)
    layers = json.loads(metadata.get("layers", "{}"))
    return common, {path: common._replace(rank=rank, alpha=alpha) for path, (rank, alpha) in layers.items()}


def _what_is_wrong(metadata: Metadata, factors: Factors) -> str:
    for name in _NEEDED:
        if name not in metadata:
            return f"its metadata has no {name}"
    try:
        common, layers = described_factors(metadata)
        targets = json.loads(metadata["target_layers"])
        json.loads(metadata["base_values"])
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        return f"its metadata can't be read: {error}"
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not is_list or not all(_is_possible(one) for one in (common, *layers.values())):
        return f"its metadata says rank={common.rank}, alpha={common.alpha}, target_layers={targets!r:.80}"
    if metadata.get("sha256") not in (None, sealed_metadata(metadata, factors)["sha256"]):
        return "its bytes are not those that were written"
    ranks = {common.rank, *(one.rank for one in layers.values())}
    for name, factor in factors.items():
        is_factor = name.endswith("_magnitude") or ranks & set(factor.shape)
        if not is_factor or not np.issubdtype(factor.dtype, np.floating):
            return f"its factor {name} is {factor.dtype} {factor.shape}, which is none of rank {common.rank}"
        if not np.isfinite(factor).all():
            return f"its factor {name} holds values that are no numbers"
    return ""


def _is_possible(lora_spec: LoraSpec) -> bool:
    layout, rank, alpha, *flags = lora_spec
    numbers = isinstance(rank, int) and isinstance(alpha, (int, float)) and rank >= 1 and 0 < alpha < math.inf
    return numbers and layout in LORA_LAYOUTS and all(isinstance(flag, bool) for flag in flags)
