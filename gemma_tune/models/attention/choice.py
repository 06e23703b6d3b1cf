"""Chooses the attention kernel that a model trains with: the fastest that its layers, rows and device allow."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.models.attention.kernels import FUSED_TILE
from gemma_tune.models.attention.swap import AttentionShape, attention_shape_of, run_kernel
from gemma_tune.runtime.backend import keras_hub

_NAMES = {"xla": "XLA", "cudnn": "cuDNN", "splash": "splash attention", "keras": "KerasHub's own"}
_FASTEST = {"cuda": "cudnn", "tpu": "splash"}  # By platform; `xla` elsewhere.
# Layers whose masks and scales `attention_shape_of` can read. Others train with KerasHub's own attention.
_KNOWN_LAYERS = ("CachedGemmaAttention", "CachedGemma3Attention", "Gemma4TextAttention")


class AttentionChoice(NamedTuple):
    """An attention kernel, and why it isn't a faster one.

    Attributes:
        kernel: `xla`, `cudnn`, `splash` or `keras`.
        reason: Why the device's fastest kernel can't be used, or "" if this is it.
    """

    kernel: str
    reason: str = ""

    def __str__(self) -> str:
        return _NAMES[self.kernel] + (f" ({self.reason})" if self.reason else "")


class Device(NamedTuple):
    """The kind of device that a run computes on.

    Attributes:
        platform: `cpu`, `cuda`, `rocm` or `tpu`.
        capability: Compute capability of an NVIDIA GPU; (9, 0) is Hopper.
    """

    platform: str
    capability: tuple[int, int] = (0, 0)


def choose_attention(backbone: keras_hub.models.Backbone, wanted: str, row_length: int) -> AttentionChoice:
    """Chooses the kernel that a model trains with on this machine's first device.

    Args:
        backbone: Backbone of any family.
        wanted: Value of `training.attention`: `auto`, or the kernel to use.
        row_length: Number of positions in a row, L.

    Raises:
        ModelError: The wanted kernel can't be used here.
    """
    device = first_device()
    kernel = _FASTEST.get(device.platform, "xla") if wanted == "auto" else wanted
    layers = [getattr(block, "attention", None) for block in getattr(backbone, "transformer_layers", [])] or [None]
    only_keras = next(filter(None, map(_own_kernels_problem, layers)), "")
    shapes = [] if only_keras else [attention_shape_of(layer) for layer in layers]
    if kernel == "keras":
        problem = _keras_problem(device, shapes)
    elif kernel == "xla" or only_keras:
        problem = only_keras
    else:
        problem = kernel_problem(kernel, device, shapes, row_length) or compile_problem(kernel, shapes, row_length)
    if not problem:
        return AttentionChoice(kernel)
    if wanted != "auto":
        raise ModelError(f"training.attention={wanted} can't be used: {problem}. Set training.attention=auto.")
    return AttentionChoice("keras" if only_keras else "xla", problem)


def kernel_problem(kernel: str, device: Device, shapes: Sequence[AttentionShape], row_length: int) -> str:
    """Returns why `cudnn` or `splash` can't be used, by the limits that are known beforehand, or "".

    cuDNN's limits are those of jax/_src/cudnn/fused_attention_stablehlo.py. It would take rows whose length isn't a
    multiple of 128, but on Hopper its backward pass with a mask makes NaN of some of them
    (github.com/pytorch/pytorch/issues/196678).
    """
    name = _NAMES[kernel]
    if kernel == "splash" and device.platform != "tpu":
        return f"{name} needs a TPU, this is {device.platform}"
    if kernel == "cudnn":
        if device.platform != "cuda":
            return f"{name} needs an NVIDIA GPU, this is {device.platform}"
        if device.capability < (8, 0):
            return f"{name} needs compute capability 8.0, this GPU has {device.capability[0]}.{device.capability[1]}"
        widest = 256 if device.capability >= (9, 0) else 128
        for shape in shapes:
            if shape.dtype not in ("float16", "bfloat16"):
                return f"{name} needs float16 or bfloat16, this is {shape.dtype}"
            if shape.soft_cap:
                return f"{name} has no soft cap of scores, this model has one of {shape.soft_cap:g}"
            if shape.head_width > widest or shape.head_width % 8:
                return (
                    f"{name} needs a head width that is a multiple of 8, at most {widest} on this GPU, "
                    f"this is {shape.head_width}"
                )
    if row_length % FUSED_TILE:
        return f"{name} needs rows of a multiple of {FUSED_TILE} tokens, these have {row_length}"
    return ""


def compile_problem(kernel: str, shapes: Sequence[AttentionShape], row_length: int) -> str:
    """Returns why a kernel's forward and backward passes don't compile, or "".

    Nothing else tells what a version of cuDNN or a generation of TPUs lacks.
    """
    for shape in sorted(set(shapes), key=str):

        def total(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, shape: AttentionShape = shape) -> Any:
            return run_kernel(kernel, q, k, v, mask, shape).astype(jnp.float32).sum()

        q, k = (
            jax.ShapeDtypeStruct((2, row_length, heads, shape.head_width), shape.dtype)
            for heads in (shape.num_heads, shape.num_kv_heads)
        )
        mask = jax.ShapeDtypeStruct((2, row_length, 1), "int32")
        if kernel == "cudnn":
            mask = jax.ShapeDtypeStruct((2, row_length, row_length), "bool")
        try:
            jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, mask).compile()
        except Exception as error:  # Any error: another kernel computes the same.
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"{_NAMES[kernel]} doesn't compile here: {first_line}"
    return ""


def _own_kernels_problem(attention: Any) -> str:
    """Returns why an attention layer can only compute as KerasHub made it, or ""."""
    if type(attention).__name__ not in _KNOWN_LAYERS:
        return "this model's attention layers are not supported"
    if getattr(attention, "use_bidirectional_attention", False):
        return "this model's attention is bidirectional"
    return "this model's attention has dropout" if attention.dropout else ""


def _keras_problem(device: Device, shapes: Sequence[AttentionShape]) -> str:
    """Returns why KerasHub's own attention computes something else here, or "".

    Its fused path takes only masks that are constants. Under jit it falls back to attention without a soft cap.
    """
    if device.platform == "tpu" and any(shape.soft_cap for shape in shapes):
        return "on TPU, KerasHub leaves out the soft cap of scores in compiled steps"
    return ""


def first_device() -> Device:
    """Returns the device that a run computes on."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return Device(device.platform)
    if "cuda" not in device.client.platform_version:
        return Device("rocm")
    numbers = re.findall(r"\d+", str(device.compute_capability))
    return Device("cuda", (int(numbers[0]), int(numbers[1])))
