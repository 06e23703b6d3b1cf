"""Writes a model's LoRA factors as a PEFT adapter, with which the base in Hugging Face's format computes the same.

PEFT's layout goes over one to one. Keras's becomes PEFT's of rank N·R where a kernel is of N heads (lora_layouts.py);
`rank_pattern` and `alpha_pattern` then say what differs from module to module. LoRA on the embedding is written twice,
for `embed_tokens` and `lm_head`, since PEFT gives each module of a tied pair factors of its own.
"""

from collections import Counter
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


class Module(NamedTuple):
    """One module's factors. lora_spec: Their spec. tensors: By the end of their names in PEFT's file."""

    lora_spec: LoraSpec
    tensors: dict[str, np.ndarray]


def can_be_peft(model: keras.Model) -> str:
    """Returns why a model's factors can't be a PEFT adapter, or ""."""
    layers = lora_layers(model.backbone)
    if not layers:
        return "The model has no LoRA factors. Train it with training.method=lora, or name its --adapter."
    known = {id(layer) for layer in layers_by_module(model.backbone).values()}
    unknown = [layer.path for layer in layers if id(layer) not in known]
    if unknown:
        return f"{unknown[0]} has LoRA factors, and no module of Hugging Face's models is known for it."
    return ""


def write_peft_adapter(model: keras.Model, directory: Path, base_name: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        model: A CausalLM with LoRA.
        directory: Exists, and is empty.
        base_name: Of the base in Hugging Face's format, as `from_pretrained` takes it: a name, or a directory. It also
            says whether the base reads text alone: the modules of one that also sees are called otherwise.

    Raises:
        ModelError: `can_be_peft` says why not.
    """
    if problem := can_be_peft(model):
        raise ModelError(problem)
    from safetensors.numpy import save_file

    prefix, found = module_prefix(base_name), peft_modules(model)
    tensors = {
        f"base_model.model.{_full_name(prefix, module)}.{name}": np.ascontiguousarray(value)
        for module, (_, values) in found.items()
        for name, value in values.items()
    }
    save_file(tensors, directory / WEIGHTS_FILE, {"format": "pt"})
    of_base = [*layers_by_module(model.backbone), LM_HEAD]
    settings = peft_settings({module: one.lora_spec for module, one in found.items()}, of_base, prefix, base_name)
    write_json(directory / CONFIG_FILE, settings)


def peft_modules(model: keras.Model) -> dict[str, Module]:
    """Returns the factors by their module, such as `layers.0.self_attn.q_proj`, as PEFT has them."""
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
        if module == EMBEDDING:  # Looking a row up is E·x with x at its place; the head multiplies with Eᵀ.
            found[LM_HEAD] = Module(lora_spec, {"lora_A.weight": high.T, "lora_B.weight": low.T})
            tensors = {"lora_embedding_A": low, "lora_embedding_B": high}
        found[module] = Module(lora_spec, tensors)
    return found


def peft_settings(
    lora_specs: dict[str, LoraSpec], of_base: Iterable[str], prefix: str, base_name: str
) -> dict[str, Any]:
    """Returns what adapter_config.json says.

    Args:
        lora_specs: Spec of each module's factors.
        of_base: All modules that there are.
        prefix: Of full names.
        base_name: Of the base.
    """
    kinds = {module: (one.rank, _whole(one.alpha)) for module, one in lora_specs.items()}
    rank, alpha = Counter(kinds.values()).most_common(1)[0][0]
    first = next(iter(lora_specs.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(lora_specs, of_base, prefix),
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


def _targets(chosen: Iterable[str], of_base: Iterable[str], prefix: str) -> list[str]:
    """Short names, such as q_proj, where all modules of that name have factors and the model has no others that see;
    else full ones.
    """
    chosen, short = set(chosen), set()
    for name in {_short(module) for module in chosen}:
        if prefix == TEXT_PREFIX and all(module in chosen for module in of_base if _short(module) == name):
            short.add(name)
    full = {_full_name(prefix, module) for module in chosen if _short(module) not in short}
    return sorted(short | full)


def _pattern(values: dict[str, Any], usual: Any, prefix: str) -> dict[str, Any]:
    """Returns what differs from the usual, by short name where all of that name are alike."""
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
    return int(alpha) if alpha == int(alpha) else alpha
