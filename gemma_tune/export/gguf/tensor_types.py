"""Chooses the GGML type of each tensor in a GGUF file, and rounds weights to it.

The mixes are those of llama.cpp's llama-quantize (src/llama-quant.cpp): norms stay float32; the tied embedding gets
more bits than the rest; `q4_k_m` gives half of the layers more bits for `attn_v` and `ffn_down`; and a tensor whose
row length is no multiple of 256 takes the next larger type with a block_size of 32.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.export.gguf.k_quants import K_QUANTIZERS

_LARGER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
_LARGEST_FLOAT16 = 65504.0


class GgufScheme(NamedTuple):
    """The GGML types of one file.

    Attributes:
        file_type: llama.cpp's number for the scheme.
        weights: Type of most tensors.
        embedding: Type of the tied embedding.
    """

    file_type: int
    weights: str
    embedding: str


GGUF_SCHEMES = {
    "f32": GgufScheme(0, "F32", "F32"),  # Lossless.
    "f16": GgufScheme(1, "F16", "F16"),  # 8 times as fine as bf16, for values up to 65504.
    "bf16": GgufScheme(32, "BF16", "BF16"),  # Lossless for a bfloat16 model.
    "q8_0": GgufScheme(7, "Q8_0", "Q8_0"),  # 8.5 bits per weight, nearly lossless.
    "q4_k_m": GgufScheme(15, "Q4_K", "Q6_K"),  # About 5 bits per weight: the usual choice for small devices.
    "q4_0": GgufScheme(2, "Q4_0", "Q6_K"),  # About 4.5 bits per weight: the smallest, and fast on phones.
}


def type_of(name: str, shape: tuple[int, ...], scheme: str, num_layers: int) -> str:
    """Returns the GGML type in which a tensor is written.

    Args:
        name: Name of the tensor in the GGUF file.
        shape: Shape in NumPy's order.
        scheme: A key of GGUF_SCHEMES.
        num_layers: Number of the model's decoder blocks.
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
    """Returns the GGML type, or its replacement if the row length is no multiple of the type's block_size."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    while row_length % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        kind = _LARGER.get(kind, "F16")
    return kind


def tensor_num_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Returns the size of a tensor in a file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(np.prod(shape, dtype=np.int64)) // block * block_bytes


def to_type(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Rounds rows to a GGML type and returns their bytes.

    Args:
        values: [rows, columns] float32, or [columns].
        kind: GGML type: `F32`, `F16`, `BF16`, `Q8_0`, …
        name: Name of the tensor, for errors.

    Raises:
        ModelError: A value is not finite, or too large for float16.
    """
    import gguf

    largest = float(np.max(np.abs(values), initial=0.0))
    if not np.isfinite(largest):
        raise ModelError(f"{name} holds NaN or infinite values: the model is damaged.")
    if kind == "F16" and largest > _LARGEST_FLOAT16:
        raise ModelError(f"{name} has a value of {largest:g}, but float16 ends at 65504. Use --scheme=bf16 or f32.")
    if kind in K_QUANTIZERS:
        return K_QUANTIZERS[kind](values)
    # The gguf package converts sixteen rows at a time in Python: longer rows are faster, and their bytes are the same.
    joined = next(count for count in (64, 16, 4, 1) if len(values) % count == 0) if values.ndim == 2 else 1
    wide: Any = values.reshape(-1, joined * values.shape[-1])
    return gguf.quants.quantize(np.ascontiguousarray(wide), gguf.GGMLQuantizationType[kind])


def _has_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
