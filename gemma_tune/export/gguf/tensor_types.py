"""In which of GGUF's number formats each tensor is written, and the rounding to it.

The mixes are those of llama.cpp's llama-quantize (src/llama-quant.cpp): norms stay float32, the tied embedding gets
more bits than the rest, `q4_k_m` gives half of the layers more for values and outputs of the feed-forward part, and a
tensor whose rows can't be cut into blocks of 256 takes the next larger format with blocks of 32.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.export.gguf import k_quants

_LARGER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
_LARGEST_FLOAT16 = 65504.0


class GgufScheme(NamedTuple):
    """How a file is written. file_type: llama.cpp's number for it. weights: of most; embedding: of the tied one."""

    file_type: int
    weights: str
    embedding: str
    says: str


GGUF_SCHEMES = {
    "f32": GgufScheme(0, "F32", "F32", "32 bits a weight: exactly the model"),
    "f16": GgufScheme(1, "F16", "F16", "16 bits, 3 digits more precise than bf16, up to 65504"),
    "bf16": GgufScheme(32, "BF16", "BF16", "16 bits, exactly a model that is in bfloat16"),
    "q8_0": GgufScheme(7, "Q8_0", "Q8_0", "8.5 bits: nearly nothing is lost"),
    "q4_k_m": GgufScheme(15, "Q4_K", "Q6_K", "about 5 bits, mixed: the usual choice for small devices"),
    "q4_0": GgufScheme(2, "Q4_0", "Q6_K", "about 4.5 bits: the smallest, and fast on phones"),
}


def type_of(name: str, shape: tuple[int, ...], scheme: str, num_layers: int) -> str:
    """Returns the name of the format that a tensor is written in.

    Args:
        name: GGUF's.
        shape: In NumPy's order.
        scheme: A key of SCHEMES.
        num_layers: Of the model.
    """
    if len(shape) == 1:
        return "F32"
    chosen = GGUF_SCHEMES[scheme]
    is_embedding = name == "token_embd.weight"
    kind = chosen.embedding if is_embedding else chosen.weights
    match = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", name)
    if scheme == "q4_k_m" and match and _has_more_bits(int(match[1]), num_layers):
        kind = "Q6_K"
    return fitting(kind, shape[-1])


def fitting(kind: str, row_length: int) -> str:
    """Returns the format, or the one to take in its place where its blocks don't divide a row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    while row_length % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        kind = _LARGER.get(kind, "F16")
    return kind


def tensor_num_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Returns what a tensor takes in a file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(np.prod(shape, dtype=np.int64)) // block * block_bytes


def to_type(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Rounds rows to a format.

    Args:
        values: [rows, columns] float32, or [columns].
        kind: `F32`, `F16`, `BF16`, `Q8_0`, …
        name: Of the tensor, for errors.

    Raises:
        ModelError: float16 can't hold a value, or a value is no number.
    """
    import gguf

    largest = float(np.max(np.abs(values), initial=0.0))
    if not np.isfinite(largest):
        raise ModelError(f"{name} holds values that are no finite numbers: the model is damaged.")
    if kind == "F16" and largest > _LARGEST_FLOAT16:
        raise ModelError(f"{name} has a value of {largest:g}, and float16 ends at 65504. Take bf16 or f32.")
    if kind in k_quants.WRITERS:
        return k_quants.WRITERS[kind](values)
    # The gguf package takes sixteen rows at a time from Python: longer rows are faster, and blocks lie in them alike.
    joined = next(count for count in (64, 16, 4, 1) if len(values) % count == 0) if values.ndim == 2 else 1
    wide: Any = values.reshape(-1, joined * values.shape[-1])
    return gguf.quants.quantize(np.ascontiguousarray(wide), gguf.GGMLQuantizationType[kind])


def _has_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
