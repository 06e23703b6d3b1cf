"""The names of quantization. Without JAX, so that settings and `--help` can know them."""

from typing import NamedTuple

SCHEMES = ("int8", "int4", "nf4")
BLOCK_SIZES = (32, 64, 128, 256)


class Grid(NamedTuple):
    """How to quantize.

    scheme: `int8`, `int4` or `nf4`. block_size: Inputs that share a scale; int8 has a scale for each channel.
    double: Also quantizes the scales of int4 and nf4, to eight bits. or_int8: Takes int8 where it can't be done.
    """

    scheme: str
    block_size: int = 64
    double: bool = False
    or_int8: bool = False


class PostTraining(NamedTuple):
    """A way to quantize a trained model.

    scheme: Of the grid. method: `gptq`, `awq` or `smoothquant`, which need calibration data, or "": rounding to the
    nearest code. rounds_inputs: As in LayerScheme.
    """

    scheme: str
    method: str = ""
    rounds_inputs: bool = False


POST_TRAINING = {
    "int8": PostTraining("int8"),
    "int8-dynamic": PostTraining("int8", rounds_inputs=True),
    "int4": PostTraining("int4"),
    "nf4": PostTraining("nf4"),
    "gptq-int4": PostTraining("int4", "gptq"),
    "awq-int4": PostTraining("int4", "awq"),
    "smoothquant-int8": PostTraining("int8", "smoothquant", rounds_inputs=True),
}


class LayerScheme(NamedTuple):
    """How one layer is held.

    grid: Of its codes. has_input_scale: Its inputs are multiplied by a scale of each (AWQ, SmoothQuant). rounds_inputs:
    Its inputs are rounded too, to int8 with a scale for each token.
    """

    grid: Grid
    has_input_scale: bool = False
    rounds_inputs: bool = False


def why_not(grid: Grid, num_inputs: int) -> str:
    """Returns why an array whose products sum over so many inputs can't be quantized so, or ""."""
    if grid.scheme != "int8" and num_inputs % grid.block_size:
        return f"block_size={grid.block_size} does not divide its {num_inputs} inputs"
    return ""
