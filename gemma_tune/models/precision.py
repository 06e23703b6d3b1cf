"""Says which number format each precision computes in, and checks which precisions suit a device.

| | float32 | bfloat16 | float16 | mixed_bfloat16 | mixed_float16 |
|---|---|---|---|---|---|
| weights of the model | float32 | bfloat16 | float16 | float32 | float32 |
| products, activations and their gradients | float32 | bfloat16 | float16 | bfloat16 | float16 |
| sums within a product, scores of attention | float32 | float32 | float32 | float32 | float32 |
| softmax, RMS norms, angles of positions | float32 | float32 | float32 | float32 | float32 |
| logits, log-sum-exp, loss | float32 | float32 | float32 | float32 | float32 |
| sums of gradients, their norm, the update | float32 | float32 | float32 | float32 | float32 |
| optimizer state, LoRA factors | float32 | float32 | float32 | float32 | float32 |
| loss scaling | | | yes | | yes |

The scores of attention are those of our kernels. KerasHub's own attention (`training.attention=keras`, and decoding)
rounds them to the format of the activations before a float32 softmax.

With float32 weights an update is added to the weight itself, which is its master copy. `bfloat16` and `float16` have no
master copy. With LoRA nothing is lost by that, since the factors are float32 in any case. When all weights are trained,
each update is computed in float32 and rounded, so that updates below 1/256 (bfloat16) or 1/2048 (float16) of a weight
are lost.

The largest float16 number is 65504. KerasHub's Gemma 3 and 4 blocks clip their outputs to it; elsewhere larger values
become infinite, and the loss becomes NaN.
"""

import jax.numpy as jnp

from gemma_tune.config_checks import PRECISIONS
from gemma_tune.errors import ModelError
from gemma_tune.models.attention.choice import Device
from gemma_tune.models.cpu.bfloat16 import multiplies_bfloat16
from gemma_tune.runtime.backend import keras, keras_hub

_BFLOAT16_CAPABILITY = (8, 0)  # Ampere.


def computes_in_float16(model: keras.Model) -> bool:
    """Returns whether a model's products and activations are float16, so that its training needs loss scaling."""
    return model.backbone.token_embedding.compute_dtype == "float16"


def check_float16_range(backbone: keras_hub.models.Backbone) -> None:
    """Checks that no float16 weight is infinite or NaN.

    Raises:
        ModelError: A variable has a value beyond 65504, or one that wasn't finite in the checkpoint; names it.
    """
    for variable in backbone.variables:
        if variable.dtype == "float16" and not bool(jnp.isfinite(variable.value).all()):
            raise ModelError(
                f"{variable.path} has a value beyond 65504, the largest in float16. Take --precision=bfloat16, "
                "mixed_bfloat16 or float32."
            )


def check_precision(device: Device, precision: str) -> str:
    """Checks a precision for a device.

    Args:
        device: Device that the model is to be trained on.
        precision: One of `PRECISIONS`.

    Returns:
        A warning that says why the precision is slow there and what to take instead, or "".

    Raises:
        ModelError: The device can't compute in this format.
    """
    mixed = "mixed_" if precision.startswith("mixed_") else ""
    dtype = precision.removeprefix("mixed_")
    if device.platform == "tpu" and dtype == "float16":
        raise ModelError(f"TPUs don't compute in float16. Take --precision={mixed}bfloat16.")
    if device.platform == "cpu" and dtype != "float32" and not (dtype == "bfloat16" and multiplies_bfloat16()):
        saves = " It halves the memory of weights." if not mixed else ""
        return f"On a CPU, {precision} is slower than float32.{saves} The fastest here is --precision=float32."
    if device.platform == "cuda" and dtype == "bfloat16" and device.capability < _BFLOAT16_CAPABILITY:
        major, minor = device.capability
        return (
            f"This GPU (compute capability {major}.{minor}) has no bfloat16 arithmetic, so {precision} is slow. "
            f"Take --precision={mixed}float16."
        )
    return ""


def suitable_precisions(device: Device) -> list[str]:
    """Returns the precisions that neither fail nor are slow on a device."""
    return [precision for precision in PRECISIONS if _suits(device, precision)]


def _suits(device: Device, precision: str) -> bool:
    try:
        return not check_precision(device, precision)
    except ModelError:
        return False
