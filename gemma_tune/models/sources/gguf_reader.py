"""Reads the header of a GGUF file, and its tensors without loading the whole file.

The format is that of ggml's docs/gguf.md (versions 2 and 3, little endian). The `gguf` package has a reader too, but it
makes a NumPy array for each of the 262,144 tokens of a Gemma vocabulary, which takes 16 s; this one takes 0.2 s.
Dequantization is the package's own.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.errors import ModelError

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


class TensorInfo(NamedTuple):
    """The entry of a tensor in the header.

    Attributes:
        name: Name of the tensor.
        shape: Shape in NumPy's order: the last axis is contiguous.
        quantization: Number of a GGMLQuantizationType.
        offset: Position of its first byte in the file.
        num_bytes: Size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int
    num_bytes: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        path: Path of the file.
        metadata: Key -> number, text as bytes, NumPy array of numbers, or list of texts as bytes.
        tensors: Name -> TensorInfo.

    Raises:
        ModelError: The file is not a GGUF file, or is truncated or damaged; the message says where.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is empty.
            raise ModelError(f"{path} can't be opened as GGUF: {error}.") from error
        self._size = len(self._data)
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ModelError(
                f"{path} is damaged or truncated: its header can't be read at byte {self._at} of {self._size}."
            ) from error

    def text(self, key: str, default: str = "") -> str:
        """Returns a value of the metadata as text."""
        value = self.metadata.get(key, default)
        return value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else str(value)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop of a tensor as float32, dequantized."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        row_bytes = info.num_bytes // info.shape[0]
        first = info.offset + start * row_bytes
        # The gguf package calls NumPy for every sixteen rows: with longer rows it takes half the time.
        joined = math.gcd(stop - start, 8)
        raw = np.frombuffer(self._data, np.uint8, (stop - start) * row_bytes, first).reshape(-1, joined * row_bytes)
        kind = GGMLQuantizationType(info.quantization)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                return dequantize(raw, kind).reshape(stop - start, *info.shape[1:])
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: tensor {name} has the quantization {kind.name}, which the gguf package can't read."
            ) from error
        finally:
            self._release(first, raw.size)

    def tensor(self, name: str) -> np.ndarray:
        """Returns a whole tensor as float32, dequantized."""
        return self.rows(name, 0, self.tensors[name].shape[0])

    def _release(self, start: int, num_bytes: int) -> None:
        """Releases the pages that were read, which would count as memory of the process until the file is closed."""
        if hasattr(self._data, "madvise"):
            page = start - start % mmap.PAGESIZE
            self._data.madvise(mmap.MADV_DONTNEED, page, start + num_bytes - page)

    def _read_header(self) -> None:
        if self._take(4) != _MAGIC:
            raise ModelError(f"{self.path} is not a GGUF file: it doesn't begin with 'GGUF'.")
        version = self._number("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} has GGUF version {version}; versions 2 and 3 can be read.")
        num_tensors, num_entries = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._bytes().decode("utf-8")
            self.metadata[key] = self._value(self._number("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{self.path} is damaged: general.alignment is {alignment!r:.60}.")
        base = -(-self._at // alignment) * alignment
        self.tensors = {info.name: info._replace(offset=base + info.offset) for info in infos}
        for info in self.tensors.values():
            if info.offset + info.num_bytes > self._size:
                raise ModelError(
                    f"{self.path} is truncated: tensor {info.name} ends at byte {info.offset + info.num_bytes}, the "
                    f"file at byte {self._size}. Download it again."
                )

    def _tensor_info(self) -> TensorInfo:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._bytes().decode("utf-8")
        num_dimensions = self._number("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ModelError(f"{self.path} is damaged: tensor {name!r} has {num_dimensions} dimensions.")
        shape = tuple(self._number("Q") for _ in range(num_dimensions))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        if kind not in GGMLQuantizationType._value2member_map_:
            raise ModelError(
                f"{self.path}: tensor {name!r} has the unknown quantization {kind}. A newer gguf package may know it."
            )
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        num_values = math.prod(shape)
        if not num_values or shape[-1] % block or (num_dimensions == 1 and block > 1):  # A row is one value then.
            raise ModelError(f"{self.path} is damaged: tensor {name!r} has shape {shape}, in blocks of {block}.")
        return TensorInfo(name, shape, kind, offset, num_values // block * block_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._bytes()
        if kind == _ARRAY:
            item_kind, count = self._number("I"), self._number("Q")
            if item_kind == _STRING:
                if count * 8 > self._size:
                    raise OverflowError
                return [self._bytes() for _ in range(count)]
            if item_kind in _SCALARS:
                dtype = np.dtype("?" if item_kind == 7 else "<" + _SCALARS[item_kind])
                return np.frombuffer(self._take(count * dtype.itemsize), dtype)
            raise ModelError(f"{self.path} is damaged: a list of the unknown kind {item_kind} at byte {self._at}.")
        if kind not in _SCALARS:
            raise ModelError(f"{self.path} is damaged: a value of the unknown kind {kind} at byte {self._at}.")
        return self._number(_SCALARS[kind])

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise OverflowError(f"{count} bytes are needed after byte {self._at}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _bytes(self) -> bytes:
        return self._take(self._number("Q"))

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
