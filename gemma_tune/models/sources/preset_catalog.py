"""The Gemma presets that the installed KerasHub knows, read from its own preset files.

The files are plain data, so they are run by themselves: importing keras_hub for a list of names would take seconds.
"""

import functools
import importlib.util
import runpy
from pathlib import Path
from typing import NamedTuple

from gemma_tune.errors import ModelError

_FOLDERS = ("gemma", "gemma3", "gemma4")
# Of the families' model cards (ai.google.dev/gemma/docs). KerasHub's presets don't say it.
_CONTEXT_TOKENS = {"gemma": 8192, "gemma2": 8192, "gemma3": 131072, "gemma4": 131072}
_SMALL_GEMMA3_CONTEXT_TOKENS = 32768
_SMALL_GEMMA3_PARAMS = 1.5e9
_LARGE_GEMMA4_CONTEXT_TOKENS = 262144
_LARGE_GEMMA4_PARAMS = 20e9


class Preset(NamedTuple):
    """One preset.

    Attributes:
        is_multimodal: It also has a vision or audio tower, which gemma_tune leaves out: only its text part is loaded.
        handle: Where it is downloaded from.
    """

    name: str
    family: str
    num_params: int
    context_tokens: int
    is_multimodal: bool
    is_instruct: bool
    handle: str
    description: str


@functools.cache
def presets() -> tuple[Preset, ...]:
    """Returns all presets that generate text, smallest first within a family."""
    spec = importlib.util.find_spec("keras_hub")
    if spec is None or spec.origin is None:
        raise ModelError("keras-hub is not installed. Run: pip install keras-nlp")
    found = []
    for folder in _FOLDERS:
        file = Path(spec.origin).parent / "src" / "models" / folder / f"{folder}_presets.py"
        for name, entry in runpy.run_path(str(file))["backbone_presets"].items():
            metadata = entry["metadata"]
            description = metadata["description"]
            if any(
                word in f"{name} {description}".lower()
                for word in ("embedding-focused", "embedding_", "assistant model")
            ):
                continue  # They don't write text.
            found.append(_preset(name, folder, metadata["params"], description, entry["kaggle_handle"]))
    return tuple(sorted(found, key=lambda preset: (preset.family, preset.num_params, preset.name)))


def preset_names() -> list[str]:
    """Returns the names of all presets."""
    return [preset.name for preset in presets()]


def context_tokens(family: str, num_params: int) -> int:
    """Returns how many tokens a published model of a family and size was made for."""
    if family == "gemma3" and num_params < _SMALL_GEMMA3_PARAMS:
        return _SMALL_GEMMA3_CONTEXT_TOKENS
    if family == "gemma4" and num_params > _LARGE_GEMMA4_PARAMS:
        return _LARGE_GEMMA4_CONTEXT_TOKENS
    return _CONTEXT_TOKENS[family]


def _preset(name: str, folder: str, num_params: int, description: str, handle: str) -> Preset:
    family = folder
    if folder == "gemma" and any(mark in name for mark in ("gemma2", "gemma_2_", "shieldgemma", "vault_gemma")):
        family = "gemma2"
    is_multimodal = folder != "gemma" and "text-only" not in description.lower()
    context = context_tokens(family, num_params)
    is_instruct = "instruct" in name or name.endswith("_it")
    return Preset(name, family, num_params, context, is_multimodal, is_instruct, handle, " ".join(description.split()))
