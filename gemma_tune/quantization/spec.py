"""Quantization specs and schemes. This module doesn't import JAX, so that settings and `--help` can use it."""

from typing import NamedTuple

SCHEMES = ("int8", "int4", "nf4")
BLOCK_SIZES = (32, 64, 128, 256)


class QuantSpec(NamedTuple):
    """A quantization spec: the scheme of the codes, and its options.

    Attributes:
        scheme: `int8`, `int4` or `nf4`.
        block_size: Number of inputs that share a scale in int4 and nf4. int8 has a scale for each output channel.
        double: Whether the scales of int4 and nf4 are quantized too, to eight bits (double quantization).
        or_int8: Whether layers whose inputs `block_size` doesn't divide get int8.
    """

    scheme: str
    block_size: int = 64
    double: bool = False
    or_int8: bool = False


class PtqScheme(NamedTuple):
    """A way of post-training quantization (PTQ).

    Attributes:
        scheme: Scheme of the codes, as in QuantSpec.
        method: `gptq`, `awq` or `smoothquant`, which need calibration data, or "" for rounding to the nearest code.
        rounds_inputs: Whether layers round their inputs too, as in LayerScheme.
    """

    scheme: str
    method: str = ""
    rounds_inputs: bool = False


PTQ_SCHEMES = {
    "int8": PtqScheme("int8"),
    "int8-dynamic": PtqScheme("int8", rounds_inputs=True),
    "int4": PtqScheme("int4"),
    "nf4": PtqScheme("nf4"),
    "gptq-int4": PtqScheme("int4", "gptq"),
    "awq-int4": PtqScheme("int4", "awq"),
    "smoothquant-int8": PtqScheme("int8", "smoothquant", rounds_inputs=True),
}


class LayerScheme(NamedTuple):
    """The way in which one layer is quantized.

    Attributes:
        quant_spec: Quantization spec of the kernel's codes.
        has_input_scale: Whether each input is multiplied by a scale first (AWQ, SmoothQuant).
        rounds_inputs: Whether the inputs are rounded too, to int8 with a scale for each token.
    """

    quant_spec: QuantSpec
    has_input_scale: bool = False
    rounds_inputs: bool = False


def block_size_problem(quant_spec: QuantSpec, num_inputs: int) -> str:
    """Returns why a kernel with so many inputs can't be quantized with a spec, or ""."""
    if quant_spec.scheme != "int8" and num_inputs % quant_spec.block_size:
        return f"block_size={quant_spec.block_size} does not divide its {num_inputs} inputs"
    return ""
