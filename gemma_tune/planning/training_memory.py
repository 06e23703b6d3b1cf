"""Estimates the memory of training from the number of parameters alone, to choose a model by.

`gemma-tune train --dry_run` is more exact, since it asks the compiler. Counted here are the weights; the gradients and
AdamW's two float32 moments of those that are trained; and a share for the activations of one row of 1,024 tokens that
are recomputed block by block.
"""

from typing import NamedTuple

_ACTIVATIONS = 0.1  # Rough share of the bytes of bfloat16 weights.
_PROCESS_BYTES = 0.6e9  # Python, JAX, Keras, and buffers whose size doesn't depend on the model.
_LORA_SHARE = 0.01  # Share of parameters that LoRA of rank 16 on all linear layers adds.


class TrainingMemory(NamedTuple):
    """The bytes that training needs with each method.

    Attributes:
        full: Bytes with float32 weights, gradients and two moments, 16 a parameter.
        lora: Bytes with frozen bfloat16 weights, 2 a parameter.
        qlora: Bytes with frozen 4-bit weights and their scales, 0.6 a parameter.
    """

    full: float
    lora: float
    qlora: float


def training_memory(num_params: int) -> TrainingMemory:
    """Returns the estimated memory of training a model with so many parameters."""
    base = _PROCESS_BYTES + _ACTIVATIONS * 2 * num_params
    adapter = 16 * _LORA_SHARE * num_params
    return TrainingMemory(16 * num_params + base, 2 * num_params + adapter + base, 0.6 * num_params + adapter + base)
