"""The names of quantization. Without JAX, so that settings and `--help` can know them."""

from typing import NamedTuple

SCHEMES = ("int8", "int4", "nf4")
BLOCK_SIZES = (32, 64, 128, 256)


class QuantSpec(NamedTuple):
    """How to quantize.

    scheme: `int8`, `int4` or `nf4`. block_size: Inputs that share a scale; int8 has a scale for each channel.
    double: Also quantizes the scales of int4 and nf4, to eight bits. or_int8: Takes int8 where it can't be done.
    """

    scheme: str
    block_size: int = 64
    double: bool = False
    or_int8: bool = False


class PtqScheme(NamedTuple):
    """A way to quantize a trained model.

    scheme: Of the grid. method: `gptq`, `awq` or `smoothquant`, which need calibration data, or "": rounding to the
    nearest code. rounds_inputs: As in LayerScheme.
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
    """How one layer is held.

    quant_spec: Of its codes. has_input_scale: Its inputs are multiplied by a scale of each (AWQ, SmoothQuant). rounds_inputs:
    Its inputs are rounded too, to int8 with a scale for each token.
    """

    quant_spec: QuantSpec
    has_input_scale: bool = False
    rounds_inputs: bool = False


def block_size_problem(quant_spec: QuantSpec, num_inputs: int) -> str:
    """Returns why an array whose products sum over so many inputs can't be quantized so, or ""."""
    if quant_spec.scheme != "int8" and num_inputs % quant_spec.block_size:
        return f"block_size={quant_spec.block_size} does not divide its {num_inputs} inputs"
    return ""
