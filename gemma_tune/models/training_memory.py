"""How much memory training takes, from the number of parameters alone: enough to choose a model by.

`gemma-tune train --dry_run` knows better: it asks the compiler. Counted here are the weights, their gradients and
AdamW's two float32 moments where they are trained, and a share for activations of one row of 1,024 tokens, recomputed
block by block.
"""

import re
from typing import NamedTuple

_ACTIVATIONS = 0.1  # Of the bfloat16 weights' bytes: a rough share, to choose a model by.
_PROCESS_BYTES = 0.6e9  # Python, JAX, Keras, and buffers that don't grow with the model.
_LORA_SHARE = 0.01  # Trained parameters of rank 16 on all linear layers, of all.


class TrainingMemory(NamedTuple):
    """Bytes that training needs, by method.

    full: float32 weights, gradients and two moments, 16 bytes a parameter. lora: frozen bfloat16 weights, 2 bytes.
        qlora: frozen 4-bit weights with their scales, 0.6 bytes.
    """

    full: float
    lora: float
    qlora: float


def training_memory(num_params: int) -> TrainingMemory:
    """Returns what training a model of so many parameters takes."""
    base = _PROCESS_BYTES + _ACTIVATIONS * 2 * num_params
    adapter = 16 * _LORA_SHARE * num_params
    return TrainingMemory(16 * num_params + base, 2 * num_params + adapter + base, 0.6 * num_params + adapter + base)


def parse_bytes(text: str) -> float:
    """Returns the bytes that a size like `16GB`, `512MB` or `80GiB` means; a bare number is in GB.

    Raises:
        ValueError: It is no size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(I?)(B?)\s*", text.upper())
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no size like 16GB.")
    number, prefix, binary, _ = match.groups()
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or "G")
