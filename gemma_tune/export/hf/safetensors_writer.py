"""Writes safetensors files tensor by tensor; the library's own writer takes all tensors at once.

The layout (github.com/huggingface/safetensors): eight bytes with the header's length, little endian; a JSON header with
each tensor's dtype, shape and place; then the tensors, C-contiguous, one after another.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gemma_tune.export.hf.tensors import Tensor

INDEX = "model.safetensors.index.json"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_METADATA = {"format": "pt"}  # transformers asks for it.
_ALIGNMENT = 8


def write_sharded(
    folder: Path, tensors: Sequence[Tensor], dtype: str, max_shard_bytes: int, advance: Callable[[int], None]
) -> None:
    """Writes tensors into one or several files, with an index where there are several.

    Args:
        folder: For the files.
        tensors: In their order.
        dtype: A key of numpy's, or bfloat16.
        max_shard_bytes: No file gets larger, unless one tensor alone is.
        advance: Called with how many tensors more are written.
    """
    kind = np.dtype(dtype)
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = _num_bytes(tensor, kind)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, kind, advance)
    if len(shards) > 1:
        total = sum(_num_bytes(tensor, kind) for tensor in tensors)
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, tensors: Sequence[Tensor], dtype: np.dtype, advance: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for tensor in tensors:
        start, end = end, end + _num_bytes(tensor, dtype)
        header[tensor.name] = {"dtype": _DTYPES[dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for chunk in tensor.chunks(dtype):
                file.write(_bytes(chunk))
            advance(1)


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _num_bytes(tensor: Tensor, dtype: np.dtype) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize
