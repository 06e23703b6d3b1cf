"""Lists the Gemma presets that the installed KerasHub knows, from its own preset files.

The files are Python modules of plain data, which are run on their own: importing keras_hub would take seconds.
"""

import functools
import importlib.util
import runpy
from pathlib import Path
from typing import NamedTuple

from gemma_tune.errors import ModelError

_FOLDERS = ("gemma", "gemma3", "gemma4")
# From the model cards (ai.google.dev/gemma/docs). KerasHub's presets don't have it.
_CONTEXT_TOKENS = {"gemma": 8192, "gemma2": 8192, "gemma3": 131072, "gemma4": 131072}
_SMALL_GEMMA3_CONTEXT_TOKENS = 32768
_SMALL_GEMMA3_PARAMS = 1.5e9
_LARGE_GEMMA4_CONTEXT_TOKENS = 262144
_LARGE_GEMMA4_PARAMS = 20e9


class Preset(NamedTuple):
    """A preset of KerasHub.

    Attributes:
        name: Name, such as `gemma3_1b`.
        family: Name of its family.
        num_params: Number of parameters.
        context_tokens: Number of tokens that the model was made for.
        is_multimodal: Whether it also has a vision or audio tower, which gemma_tune doesn't load.
        is_instruct: Whether it is tuned to follow instructions.
        handle: Handle on Kaggle, from which it is downloaded.
        description: KerasHub's description.
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
    """Returns all presets that generate text, by family and then by size."""
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
                continue  # These don't generate text.
            found.append(_preset(name, folder, metadata["params"], description, entry["kaggle_handle"]))
    return tuple(sorted(found, key=lambda preset: (preset.family, preset.num_params, preset.name)))


def preset_names() -> list[str]:
    """Returns the names of all presets."""
    return [preset.name for preset in presets()]


def context_tokens(family: str, num_params: int) -> int:
    """Returns the number of tokens that a published model of a family and size was made for."""
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
