"""Writes safetensors files whose bytes depend on their contents alone.

The safetensors package writes metadata in random order, so that equal contents give different files. The format
(github.com/huggingface/safetensors) is the header's length in eight little-endian bytes, a JSON header with each
tensor's dtype, shape and place, and the tensors' C-contiguous bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_DTYPE_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ALIGNMENT = 8


def safetensors_header(tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes that precede the tensors in a safetensors file, with metadata sorted by key.

    Args:
        tensors: Name, shape and float dtype of each tensor, in the order in which their bytes follow.
        metadata: Metadata of the file.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes float arrays into a safetensors file: those of the widest dtype first, which aligns all, then by name.

    Raises:
        OSError: The file can't be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with open(path, "wb") as file:
        file.write(safetensors_header(((name, tensors[name].shape, tensors[name].dtype) for name in names), metadata))
        for name in names:
            file.write(contiguous_bytes(tensors[name]))


def contiguous_bytes(array: np.ndarray) -> memoryview:
    """Returns an array's bytes in C order, without a copy where they are so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
