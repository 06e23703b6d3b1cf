"""Writes a model's LoRA factors as a PEFT adapter, with which the base in Hugging Face's format computes the same.

Factors in PEFT's layout are written unchanged. Those in Keras's layout become PEFT's with rank N·R where a kernel has N
heads (models/lora/layouts.py); `rank_pattern` and `alpha_pattern` then give what differs from module to module. vLLM's
vllm/lora/peft_helper.py reads neither: it takes `r` for the largest rank, and scales all modules by `lora_alpha / r`.
So `r` is the largest rank, and where modules have different scales, that of the first is taken for all and the rest is
multiplied into B. LoRA on the embedding is written twice, for `embed_tokens` and `lm_head`, since PEFT has separate
factors for the two modules of a tied embedding.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.lora.factors import LoraSpec
from gemma_tune.models.lora.layers import equation_of, factors_of, lora_spec_of
from gemma_tune.models.lora.layouts import as_matrices, to_peft
from gemma_tune.models.lora.peft_config import CONFIG_FILE, WEIGHTS_FILE
from gemma_tune.models.lora.peft_names import EMBEDDING, LM_HEAD, TEXT_PREFIX, layers_by_module, module_prefix
from gemma_tune.runtime.atomic_files import write_json
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.processes import fetch_to_host
from gemma_tune.runtime.safetensors_file import write_safetensors


class PeftModule(NamedTuple):
    """LoRA factors of one module.

    Attributes:
        lora_spec: Kind of the factors.
        tensors: Arrays by the end of their names in PEFT's file.
    """

    lora_spec: LoraSpec
    tensors: dict[str, np.ndarray]


def can_be_peft(model: keras.Model) -> str:
    """Returns why a model's factors can't be a PEFT adapter, or ""."""
    layers = lora_layers(model.backbone)
    if not layers:
        return "The model has no LoRA factors. Train it with training.method=lora, or give its --adapter."
    known = {id(layer) for layer in layers_by_module(model.backbone).values()}
    unknown = [layer.path for layer in layers if id(layer) not in known]
    if unknown:
        return f"{unknown[0]} has LoRA factors, but no module of Hugging Face's models is known to be this layer."
    return ""


def write_peft_adapter(model: keras.Model, directory: Path, base_name: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        model: CausalLM with LoRA.
        directory: Existing, empty directory.
        base_name: Base model in Hugging Face's format, as `from_pretrained` takes it: a name or a directory; '' if
            unknown. It also decides the modules' names, which differ between text-only and multimodal models.

    Raises:
        ModelError: The factors can't be a PEFT adapter; says why.
    """
    if problem := can_be_peft(model):
        raise ModelError(problem)
    prefix, found = module_prefix(base_name), peft_modules(model)
    tensors = {
        f"base_model.model.{_full_name(prefix, module)}.{name}": value
        for module, (_, values) in found.items()
        for name, value in values.items()
    }
    write_safetensors(directory / WEIGHTS_FILE, tensors, {"format": "pt"})
    all_modules = [*layers_by_module(model.backbone), LM_HEAD]
    lora_specs = {module: one.lora_spec for module, one in found.items()}
    write_json(directory / CONFIG_FILE, peft_settings(lora_specs, all_modules, prefix, base_name))


def peft_modules(model: keras.Model) -> dict[str, PeftModule]:
    """Returns the factors in PEFT's layout and with one scale, by their module, such as `layers.0.self_attn.q_proj`."""
    layers = {id(layer) for layer in lora_layers(model.backbone)}
    found = {}
    for module, layer in layers_by_module(model.backbone).items():
        if id(layer) not in layers:
            continue
        a, b, *magnitude = (fetch_to_host(factor.value).astype(np.float32) for factor in factors_of(layer))
        lora_spec, a, b = to_peft(equation_of(layer), lora_spec_of(layer), a, b)
        low, high = as_matrices(a, b)
        tensors = {"lora_A.weight": low, "lora_B.weight": high}
        if magnitude:
            tensors["lora_magnitude_vector"] = magnitude[0].reshape(-1)
        if module == EMBEDDING:  # A lookup multiplies a one-hot vector with E, the LM head a hidden state with Eᵀ.
            found[LM_HEAD] = PeftModule(lora_spec, {"lora_A.weight": high.T, "lora_B.weight": low.T})
            tensors = {"lora_embedding_A": low, "lora_embedding_B": high}
        found[module] = PeftModule(lora_spec, tensors)
    return _with_one_scale(found)


def _with_one_scale(modules: dict[str, PeftModule]) -> dict[str, PeftModule]:
    """Returns the same updates, s·B·A, with the scale s of the first module. Those of other scales get another B."""
    first = next((one.lora_spec.scale for one in modules.values()), 1.0)
    scaled = {}
    for module, (lora_spec, tensors) in modules.items():
        growth = lora_spec.scale / first
        if not math.isclose(growth, 1.0, rel_tol=1e-6):
            lora_spec = lora_spec._replace(alpha=lora_spec.alpha / growth)
            part = "_A" if module == LM_HEAD else "_B"  # The tied matrix's own B, which is the LM head's A.
            tensors = {name: value * np.float32(growth) if part in name else value for name, value in tensors.items()}
        scaled[module] = PeftModule(lora_spec, tensors)
    return scaled


def peft_settings(
    lora_specs: dict[str, LoraSpec], all_modules: Iterable[str], prefix: str, base_name: str
) -> dict[str, Any]:
    """Returns the contents of adapter_config.json.

    Args:
        lora_specs: Spec of each module's factors, all of the same scale.
        all_modules: All modules of the base that could have factors.
        prefix: Beginning of full module names.
        base_name: Name of the base model.
    """
    kinds = {module: (one.rank, _whole(one.alpha)) for module, one in lora_specs.items()}
    rank, alpha = max(kinds.values())
    first = next(iter(lora_specs.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(lora_specs, all_modules, prefix),
        "rank_pattern": _pattern({module: kind[0] for module, kind in kinds.items()}, rank, prefix),
        "alpha_pattern": _pattern({module: kind[1] for module, kind in kinds.items()}, alpha, prefix),
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _targets(chosen: Iterable[str], all_modules: Iterable[str], prefix: str) -> list[str]:
    """Returns short names, such as q_proj, where all modules of that name have factors and the base is text-only, and
    full names elsewhere.
    """
    chosen, short = set(chosen), set()
    for name in {_short(module) for module in chosen}:
        if prefix == TEXT_PREFIX and all(module in chosen for module in all_modules if _short(module) == name):
            short.add(name)
    full = {_full_name(prefix, module) for module in chosen if _short(module) not in short}
    return sorted(short | full)


def _pattern(values: dict[str, Any], usual: Any, prefix: str) -> dict[str, Any]:
    """Returns the values that differ from the usual one, by short name where all modules of that name have the same."""
    pattern = {}
    for module, value in values.items():
        alike = len({one for other, one in values.items() if _short(other) == _short(module)}) == 1
        if value != usual:
            name = _short(module) if alike else _full_name(prefix, module).replace(".", r"\.")
            pattern[name] = value
    return pattern


def _short(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _full_name(prefix: str, module: str) -> str:
    return module if module == LM_HEAD else prefix + module


def _whole(alpha: float) -> float | int:
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
